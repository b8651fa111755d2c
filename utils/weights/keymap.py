"""One table that is read in both directions: the names and tensors of diffusers, and those of a model's release.

A pattern is a name with places in braces: ``{p}`` stands for ``weight`` or ``bias``, any other (``{i}``) for a block's number.
The first rule that matches a name is the one that counts, so an exact name goes before a pattern that covers it.  A name that no
rule matches is an error: nothing is ever left out or passed on in silence.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Generic, Literal, TypeVar

from torch import Tensor

from utils.errors import listed
from utils.weights.rules import Fuse, Rename, Rule, Source, Transform

__all__ = ["Fuse", "KeyMap", "Layout", "ModulePlace", "Rename", "Rule", "Source", "Transform"]

Layout = Literal["diffusers", "released"]
Value = TypeVar("Value")
NAMED_PROBLEMS = 5


@dataclass(frozen=True)
class ModulePlace:
    """The module that a path in a file means."""

    path: str
    """The path in ``layout``, its parts joined by dots."""
    layout: Layout
    modules: tuple[str, ...]
    """The diffusers modules whose weights it holds, in the order of its rows."""


@cache  # tables are made anew for each file, always of the same patterns
def _compiled(pattern: str) -> re.Pattern:
    """``blocks.{i}.ffn.{p}`` as a regular expression with a named group for each place."""
    texts = re.split(r"\{(\w+)\}", pattern)
    places = [f"(?P<{place}>weight|bias)" if place == "p" else rf"(?P<{place}>\d+)" for place in texts[1::2]]
    return re.compile("".join(re.escape(text) + place for text, place in zip(texts[::2], [*places, ""], strict=True)))


@dataclass(frozen=True)
class _Entry:
    pattern: str
    rule: Rule
    part: int


class _Finder(Generic[Value]):
    """Finds the first of many patterns that a name matches.  Names and patterns without their numbers tell which to try."""

    def __init__(self, patterns: Iterable[tuple[str, Value]]):
        self._by_form: dict[str, list[tuple[re.Pattern, Value]]] = {}
        for pattern, value in patterns:
            for form in {_form(_example(pattern, "0", suffix)) for suffix in ("weight", "bias")}:
                self._by_form.setdefault(form, []).append((_compiled(pattern), value))

    def find(self, name: str) -> tuple[Value, dict[str, str]] | None:
        """What belongs to the pattern, and what stands in its places."""
        for expression, value in self._by_form.get(_form(name), ()):
            if match := expression.fullmatch(name):
                return value, match.groupdict()
        return None


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)


class KeyMap:
    """A family's table of rules.

    ``prefixes`` are those that other programs put before released names; they are taken off when a file is read.  ``ignored`` are
    patterns of names that files may hold although the model does not use them.
    """

    def __init__(self, rules: Iterable[Rule], *, prefixes: Iterable[str] = (), ignored: Iterable[str] = ()):
        rules = tuple(rules)
        self._prefixes = tuple(prefixes)
        self._ignored = [_compiled(pattern) for pattern in ignored]
        self._tables: dict[Layout, list[_Entry]] = {
            "diffusers": [_Entry(name, rule, part) for rule in rules for part, name in enumerate(rule.parts)],
            "released": [_Entry(rule.released, rule, 0) for rule in rules],
        }
        self._finders = {layout: _Finder((entry.pattern, entry) for entry in table) for layout, table in self._tables.items()}
        self._module_finders: dict[tuple[Layout, str], _Finder[str]] = {}
        for layout, table in self._tables.items():
            assert len({entry.pattern for entry in table}) == len(table), f"two rules have the same {layout} pattern"
        for entry in self._tables["diffusers"]:
            places = set(_compiled(entry.pattern).groupindex)
            assert places == set(_compiled(entry.rule.released).groupindex), f"{entry.rule}: the places in braces differ"

    def to_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Diffusers tensors as the release holds them.  ValueError for unknown names and for fused tensors with a part missing."""
        self._refuse_unknown(state, "diffusers")
        released: dict[str, Tensor] = {}
        for name in state:
            if self._is_ignored(name):
                continue
            entry, places = self._required(name, "diffusers")
            key = entry.rule.released.format(**places)
            if key in released:
                continue
            parts = [part.format(**places) for part in entry.rule.parts]
            if missing := [part for part in parts if part not in state]:
                raise ValueError(f"{key} is made of {', '.join(parts)}; {', '.join(missing)} missing")
            released[key] = entry.rule.join([state[part] for part in parts])
        return released

    def to_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Released tensors, named without a prefix, as diffusers holds them; parts of a fused one are views.

        ValueError for unknown names.
        """
        self._refuse_unknown(state, "released")
        return {
            name: self.sources_of(name, "released").take(tensor)
            for key, tensor in state.items()
            for name in self.diffusers_names(key, "released")
        }

    def released_name(self, diffusers_name: str) -> str:
        """The released tensor that holds this one; parts of a fused tensor share it."""
        return self.sources_of(diffusers_name, "released").key

    def module_path(self, diffusers_path: str) -> str:
        """The released path of a module whose weight is only renamed.

        ValueError for a fused or transformed one: there a name is not enough (see :class:`Transform` and :meth:`sources_of`).
        """
        source = self.sources_of(f"{diffusers_path}.weight", "released")
        if source != Source(source.key):
            raise ValueError(f"{diffusers_path} is not just renamed in the released layout: {source.key} holds it in another form")
        return source.key.removesuffix(".weight")

    def sources_of(self, diffusers_name: str, layout: Layout) -> Source:
        """Which tensor of a file in ``layout`` gives this one, and how.  ValueError for an unknown name."""
        entry, places = self._required(diffusers_name, "diffusers")
        if layout == "diffusers":
            return Source(diffusers_name)
        return entry.rule.source(entry.part, entry.rule.released.format(**places))

    def diffusers_names(self, key: str, layout: Layout) -> list[str]:
        """The diffusers tensors that a file's tensor gives; none for an ignored one.  ValueError for an unknown key."""
        if self._is_ignored(key):
            return []
        entry, places = self._required(key, layout)
        return [key] if layout == "diffusers" else [part.format(**places) for part in entry.rule.parts]

    def place_of(self, path: str, separator: str = ".") -> ModulePlace | None:
        """What a module's path means, in either layout; its parts may be joined by ``_``.  None for an unknown one.

        No list of the model's modules is needed: ``blocks_0_ffn_2``, too, can mean only one module.  A path that both layouts know
        is the released one, for that is what other programs write.
        """
        for layout in ("released", "diffusers"):
            if found := self._modules(layout, separator).find(path):
                pattern, places = found
                dotted = pattern.format(**places)
                names = self.diffusers_names(f"{dotted}.weight", layout)
                return ModulePlace(dotted, layout, tuple(name.removesuffix(".weight") for name in names)) if names else None
        return None

    def _modules(self, layout: Layout, separator: str) -> _Finder[str]:
        """Finds a module's path with places by how it is spelt with this separator."""
        if (layout, separator) not in self._module_finders:
            weights = [entry.pattern for entry in self._tables[layout] if entry.pattern.endswith((".{p}", ".weight"))]
            modules = dict.fromkeys(pattern.rpartition(".")[0] for pattern in weights)
            self._module_finders[layout, separator] = _Finder((module.replace(".", separator), module) for module in modules)
        return self._module_finders[layout, separator]

    def stripped(self, keys: Iterable[str]) -> dict[str, str]:
        """Keys of a file by the name without prefix.  If a known prefix occurs, only keys that have it belong to the model."""
        keys = list(keys)
        prefix = next((prefix for prefix in self._prefixes if any(key.startswith(prefix) for key in keys)), "")
        return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}

    def layout_of(self, keys: Iterable[str]) -> Layout | None:
        """The layout in which more of the keys are known; None if that is less than half of them.  A prefix does no harm."""
        names = list(self.stripped(keys))
        known = {layout: len(names) - len(self.unknown(names, layout)) for layout in self._tables}
        best = max(known, key=known.__getitem__)
        return best if known[best] and known[best] * 2 >= len(names) else None

    def unknown(self, keys: Iterable[str], layout: Layout) -> list[str]:
        """Keys that no rule of the layout matches."""
        return [key for key in keys if not self._is_ignored(key) and self._finders[layout].find(key) is None]

    def unknown_problems(self, keys: Iterable[str], layout: Layout) -> list[str]:
        """The first few unknown keys, each with the known name that is nearest, and the number of the others."""
        unknown = self.unknown(keys, layout)
        problems = [key + self._nearest(key, layout) for key in unknown[:NAMED_PROBLEMS]]
        return problems + ([f"and {len(unknown) - NAMED_PROBLEMS} more"] if len(unknown) > NAMED_PROBLEMS else [])

    def examples(self, layout: Layout, count: int) -> list[str]:
        """A few names of the layout, spread over the table, for messages."""
        table = self._tables[layout]
        return [_example(entry.pattern, "0", "weight") for entry in table[:: max(1, len(table) // count)]][:count]

    def _required(self, key: str, layout: Layout) -> tuple[_Entry, dict[str, str]]:
        match = self._finders[layout].find(key)
        if match is None:
            raise ValueError(f"{key} is not a name of this model's {layout} layout{self._nearest(key, layout)}")
        return match

    def _is_ignored(self, key: str) -> bool:
        return any(expression.fullmatch(key) for expression in self._ignored)

    def _refuse_unknown(self, keys: Iterable[str], layout: Layout) -> None:
        if problems := self.unknown_problems(keys, layout):
            raise ValueError(listed(problems, f"not names of this model's {layout} layout:"))

    def _nearest(self, key: str, layout: Layout) -> str:
        number = re.search(r"\d+", key)
        suffix = "bias" if key.endswith("bias") else "weight"
        candidates = [_example(entry.pattern, number[0] if number else "0", suffix) for entry in self._tables[layout]]
        near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.8)
        return f" (the nearest known name is {near[0]})" if near else ""


def _example(pattern: str, number: str, suffix: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda place: suffix if place[1] == "p" else number, pattern)
