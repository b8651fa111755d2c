"""One table that is read in both directions: the names and tensors of diffusers, and those of a model's release.

A pattern is a name with places in braces: ``{p}`` stands for ``weight`` or ``bias``, any other (``{i}``) for a block's number.
The first rule that matches a name is the one that counts, so an exact name goes before a pattern that covers it.  A name that no
rule matches is an error: nothing is ever left out or passed on in silence.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from utils.errors import UserError, listed

Layout = Literal["diffusers", "released"]
NAMED_PROBLEMS = 5


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where one diffusers tensor is found: some rows of the tensor ``key``, then ``convert`` (which works on meta tensors too)."""

    key: str
    share: tuple[int, int, int] | None = None
    """``(start, stop, whole)``: rows ``start / whole`` to ``stop / whole``.  None: all of it."""
    convert: Callable[[Tensor], Tensor] = _unchanged

    def rows(self, shape: Sequence[int]) -> slice | None:
        """The rows to read of a tensor of ``shape``; None for all.  UserError if the shares do not divide its rows."""
        if self.share is None:
            return None
        start, stop, whole = self.share
        if not shape or shape[0] % whole:
            raise UserError(f"{self.key} has the shape {list(shape)}; its rows should be a multiple of {whole}")
        return slice(start * (shape[0] // whole), stop * (shape[0] // whole))

    def take(self, tensor: Tensor) -> Tensor:
        """The diffusers tensor, given the whole one."""
        rows = self.rows(tensor.shape)
        return self.convert(tensor if rows is None else tensor[rows])


class Rule(Protocol):
    """How tensors of diffusers make one tensor of the release (``join``) and are found in it (``source``)."""

    released: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The diffusers patterns."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The released tensor, from one tensor for each part."""

    def source(self, part: int, key: str) -> Source:
        """Where part number ``part`` lies in the released tensor ``key``."""


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    diffusers: str
    released: str

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.diffusers,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def source(self, part: int, key: str) -> Source:
        return Source(key)


@dataclass(frozen=True)
class Fuse:
    """Several tensors that the release holds as one, joined along the rows in this order.

    ``shares`` gives the parts' rows in proportion, e.g. ``(1, 1, 1, 4)`` for q, k, v and an MLP of four times the width.
    """

    released: str
    diffusers: tuple[str, ...]
    shares: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "diffusers", tuple(self.diffusers))
        object.__setattr__(self, "shares", tuple(self.shares) or (1,) * len(self.diffusers))
        assert len(self.shares) == len(self.diffusers), f"{self.released}: one share for each of {self.diffusers}"

    @property
    def parts(self) -> tuple[str, ...]:
        return self.diffusers

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = [tensor.shape[0] for tensor in tensors]
        if any(count * self.shares[0] != rows[0] * share for count, share in zip(rows, self.shares, strict=True)):
            raise ValueError(f"the parts of {self.released} have {rows} rows; they should be in proportion {list(self.shares)}")
        return torch.cat(list(tensors))

    def source(self, part: int, key: str) -> Source:
        return Source(key, (sum(self.shares[:part]), sum(self.shares[: part + 1]), sum(self.shares)))


@dataclass(frozen=True)
class Transform:
    """A tensor that the release holds in another form: ``forward`` makes the released tensor, ``inverse`` undoes it.

    For the weight of a module that can have a LoRA both work on rows alone and linearly (a permutation, a scale per row), so that
    ``to_released({"<module>.weight": B})`` is right for the LoRA's B too.
    """

    diffusers: str
    released: str
    forward: Callable[[Tensor], Tensor] = field(repr=False)
    inverse: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.diffusers,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.forward(tensors[0])

    def source(self, part: int, key: str) -> Source:
        return Source(key, convert=self.inverse)


def _compiled(pattern: str) -> re.Pattern:
    """``blocks.{i}.ffn.{p}`` as a regular expression with a named group for each place."""
    texts = re.split(r"\{(\w+)\}", pattern)
    places = [f"(?P<{place}>weight|bias)" if place == "p" else rf"(?P<{place}>\d+)" for place in texts[1::2]]
    return re.compile("".join(re.escape(text) + place for text, place in zip(texts[::2], [*places, ""], strict=True)))


@dataclass(frozen=True)
class _Entry:
    pattern: str
    expression: re.Pattern
    rule: Rule
    part: int


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
            "diffusers": [_Entry(name, _compiled(name), rule, part) for rule in rules for part, name in enumerate(rule.parts)],
            "released": [_Entry(rule.released, _compiled(rule.released), rule, 0) for rule in rules],
        }
        for layout, table in self._tables.items():
            assert len({entry.pattern for entry in table}) == len(table), f"two rules have the same {layout} pattern"
        for entry in self._tables["diffusers"]:
            places = set(entry.expression.groupindex)
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
        return [key for key in keys if not self._is_ignored(key) and self._match(key, layout) is None]

    def unknown_problems(self, keys: Iterable[str], layout: Layout) -> list[str]:
        """The first few unknown keys, each with the known name that is nearest, and the number of the others."""
        unknown = self.unknown(keys, layout)
        problems = [key + self._nearest(key, layout) for key in unknown[:NAMED_PROBLEMS]]
        return problems + ([f"and {len(unknown) - NAMED_PROBLEMS} more"] if len(unknown) > NAMED_PROBLEMS else [])

    def examples(self, layout: Layout, count: int) -> list[str]:
        """A few names of the layout, spread over the table, for messages."""
        table = self._tables[layout]
        return [_example(entry.pattern, "0", "weight") for entry in table[:: max(1, len(table) // count)]][:count]

    def _match(self, key: str, layout: Layout) -> tuple[_Entry, dict[str, str]] | None:
        for entry in self._tables[layout]:
            if match := entry.expression.fullmatch(key):
                return entry, match.groupdict()
        return None

    def _required(self, key: str, layout: Layout) -> tuple[_Entry, dict[str, str]]:
        match = self._match(key, layout)
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
