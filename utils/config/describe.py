"""The schema's types and a file's values in words, for error messages and for ``configs/README.md``."""

import difflib
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_BOUNDS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
_SINGULAR = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false", Path: "a path in quotes"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false values", Path: "paths"}
_OF_VALUES = {int: "the whole number", float: "the number", str: "the string", list: "the list", dict: "the table"}


def allowed(field: FieldInfo) -> str:
    """What a field may be: ``a whole number of at least 1``."""
    return _in_words(field.annotation, field.metadata, _SINGULAR)


def _in_words(annotation: Any, metadata: list[Any], words: dict[type, str]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if text := [extra for extra in arguments[1:] if isinstance(extra, str)]:
            return text[0]
        constraints = [part for extra in arguments[1:] for part in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _in_words(arguments[0], constraints + metadata, words)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part, metadata, words) for part in arguments if part is not type(None))
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(json.dumps(value) for value in arguments)
    if origin is list:
        return f"a list of {_in_words(arguments[0], [], _PLURAL)}" if words is _SINGULAR else "lists"
    if origin is tuple:
        return f"a list of {len(arguments)} {_in_words(arguments[0], [], _PLURAL)}"
    if origin is dict:
        return f"a table of {_in_words(arguments[1], [], _PLURAL)}"
    if table_of(annotation):
        return "a table" if words is _SINGULAR else "tables"
    bounds = [f"{_BOUNDS[type(part)][0]} {getattr(part, _BOUNDS[type(part)][1])}" for part in metadata if type(part) in _BOUNDS]
    name = words.get(annotation, f"of type {annotation}")
    return name + (f" {'of ' if bounds[0].startswith('at') else ''}{' and '.join(bounds)}" if bounds else "")


def choices(annotation: Any) -> list[str]:
    """The texts of a ``Literal``, also of an optional one."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [value for part in get_args(annotation) for value in choices(part)]


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The table that a field holds: alone, optional, or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := table_of(part))), None)


def shown(value: Any) -> str:
    """A value of a file with its type: ``the string '8'``."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    kind = "" if isinstance(value, bool) else _OF_VALUES.get(type(value), "the value") + " "
    return kind + (text if len(text) <= 80 else text[:77] + "...")


def did_you_mean(word: Any, names: list[str]) -> str:
    """``; did you mean `rank`?``, or nothing where no name is near."""
    near = difflib.get_close_matches(str(word), names, n=1) or [name for name in names if len(str(word)) > 3 and str(word) in name]
    return f"; did you mean `{near[0]}`?" if near else ""
