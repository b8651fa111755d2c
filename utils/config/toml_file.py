"""A TOML file with the line of every key, which ``tomllib`` does not tell, and values set on the command line."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

Keys = tuple[str | int, ...]
"""The way to a value: names of keys, and positions in arrays of tables."""


def dotted(keys: Keys) -> str:
    """``("directory", 1, "path")`` as ``directory[1].path``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


@dataclass
class TomlFile:
    """A parsed file.  ``places`` says where each key was set: ``file:line``, or the command line's ``--set``."""

    path: Path
    table: dict[str, Any]
    places: dict[Keys, str]

    @classmethod
    def read(cls, path: Path) -> "TomlFile":
        """Raises UserError with the line and column of a syntax error."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: the file cannot be read ({error.strerror}); relative paths start at {Path.cwd()}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8; TOML files are UTF-8 text") from error
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(_syntax_error(path, text, error)) from error
        return cls(path, table, {keys: f"{path}:{line}" for keys, line in key_lines(text).items()})

    def place(self, keys: Keys) -> str:
        """Where the key was set; for a key that was not, where the table is that it belongs to."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, str(self.path))

    def get(self, keys: Keys) -> Any:
        """The value, or None."""
        value: Any = self.table
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def put(self, keys: Keys, value: Any, place: str) -> None:
        """Set a value; tables on the way are made, an entry of a list must be there.

        Raises UserError where something else than a table is in the way.
        """
        table = self.table
        for depth, key in enumerate(keys[:-1], 1):
            table = table.setdefault(key, {}) if isinstance(table, dict) else table[key]
            if not (isinstance(table, dict) or (isinstance(table, list) and isinstance(keys[depth], int))):
                raise UserError(f"{place}: {dotted(keys[:depth])} is not a table, so it has no key {dotted(keys[depth:])}")
        table[keys[-1]] = value
        self.places[keys] = place

    def pop(self, keys: Keys) -> Any:
        """Remove a key that is there, and return its value."""
        return self.get(keys[:-1]).pop(keys[-1])

    def override(self, assignment: str) -> None:
        """Apply ``key.sub=value`` of the command line.  Raises UserError for what cannot be read."""
        name, equals, text = assignment.partition("=")
        place = f"--set {name}"  # without the value: a place is printed, and the value may be a secret
        keys = tuple(part.strip() for part in name.split("."))
        if not equals or not all(keys):
            raise UserError(f"{place}: write it as key=value or table.key=value")
        self.put(keys, _value(text.strip(), place), place)


def _value(text: str, place: str) -> Any:
    """A TOML value; what is none is text that needs no quotes on a command line, unless it set out to be something else."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("'", '"', "[", "{"):
            raise UserError(f"{place}: the value is not valid TOML: {error}") from error
        return text


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    message, _, where = str(error).rpartition(" (at ")
    numbers = re.findall(r"\d+", where)
    line, column = numbers if len(numbers) == 2 else (len(text.splitlines()), 1)
    hint = "; text stands in quotes, and true and false are written small" if message == "Invalid value" else ""
    return f"{path}:{line}:{column}: this is not valid TOML: {message}{hint}"


def key_lines(text: str) -> dict[Keys, int]:
    """The line on which each key of a valid TOML text is set, and each table begins.

    A statement is read line by line until it is valid TOML on its own, so values of several lines need no rules of their own.  Keys
    inside such a value are given the line on which it begins.
    """
    lines: dict[Keys, int] = {(): 1}
    arrays: dict[Keys, int] = {}
    table: Keys = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        start = start if statement else number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = _header(parsed, arrays)
            found = [table]
        else:
            found = [table + keys for keys in _paths(parsed)]
        for keys in found:
            lines.setdefault(keys, start)
        statement = ""
    return lines


def _header(parsed: dict[str, Any], arrays: dict[Keys, int]) -> Keys:
    """The table that a header opens.  ``arrays`` counts the elements of arrays of tables; a header's names mean the newest ones."""
    keys: Keys = ()
    value: Any = parsed
    while value:
        name, value = next(iter(value.items()))
        keys += (name,)
        if isinstance(value, list):
            arrays[keys] = arrays.get(keys, -1) + 1
            value = value[0]
        if keys in arrays:
            keys += (arrays[keys],)
    return keys


def _paths(value: Any) -> list[Keys]:
    """The ways to everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [keys for key, inner in items for keys in [(key,), *((key, *rest) for rest in _paths(inner))]]
