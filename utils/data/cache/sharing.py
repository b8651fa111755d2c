"""Dividing the work among ranks: whoever is free takes the next piece, so that unequal clips make nobody wait."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.data.cache.keys import Input, num_pixels
from utils.data.encoders import ConditionEncoder
from utils.data.media.files import DataFile
from utils.topology import Topology

MOST_ITEMS = 32
"""Of one piece."""
PIECES_EACH = 16
"""How many pieces a rank gets at least, where there are so many items, so that all of them end at about the same time."""


@dataclass(frozen=True)
class Piece:
    """A few inputs of one encoder, and of one bucket if it looks at pixels."""

    encoder: int
    """Its place in the list of encoders."""
    keys: tuple[str, ...]
    cost: int


@dataclass(frozen=True)
class Plan:
    """What is missing, in the order in which it is taken, and how much there is of it."""

    pieces: list[Piece]
    missing: list[int]
    """Items of each encoder."""
    name: str = field(default_factory=lambda: secrets.token_hex(6))
    """Tells it from other plans of these processes."""

    def cost(self, encoder: int) -> int:
        return sum(piece.cost for piece in self.pieces if piece.encoder == encoder)


def divided(
    missing: Mapping[str, Input], encoder: ConditionEncoder, place: int, batch_size: int, world_size: int
) -> Iterator[Piece]:
    """The pieces of one encoder, those of the largest items first."""
    costs = {key: cost_of(entry, encoder) for key, entry in missing.items()}
    most = max(1, min(MOST_ITEMS, len(missing) // (PIECES_EACH * world_size)))
    most = -(-most // batch_size) * batch_size
    keys: list[str] = []
    for key in sorted(missing, key=lambda key: (-costs[key], shape_of(missing[key], encoder), key)):
        if keys and (len(keys) == most or shape_of(missing[key], encoder) != shape_of(missing[keys[0]], encoder)):
            yield Piece(place, tuple(keys), sum(costs[each] for each in keys))
            keys = []
        keys.append(key)
    if keys:
        yield Piece(place, tuple(keys), sum(costs[each] for each in keys))


def cost_of(entry: Input, encoder: ConditionEncoder) -> int:
    return 1 + num_pixels(entry.sample, encoder) + (len(entry.caption) if "caption" in encoder.reads else 0)


def shape_of(entry: Input, encoder: ConditionEncoder) -> str:
    """Inputs of the same shape can be encoded at once; nothing for captions."""
    return "" if encoder.reads == "caption" else str(entry.sample.bucket)


@dataclass(frozen=True)
class Broken:
    """A file that could not be read as it was when the run looked at it, and what could not be encoded for it."""

    file: DataFile
    reason: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        file = {**asdict(self.file), "path": str(self.file.path)}
        return {"file": file, "reason": self.reason, "keys": self.keys}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Broken":
        file = DataFile(**{**told["file"], "path": Path(told["file"]["path"])})
        return cls(file, told["reason"], tuple(told["keys"]))


class Team:
    """The ranks of a run while they encode.  They share numbers and texts, and never wait in a collective for each other's work."""

    def __init__(self, topology: Topology | None):
        self._topology = topology if topology and topology.world_size > 1 else None
        self._alone: dict[str, int] = {}
        self._last: list[Broken] = []

    @property
    def size(self) -> int:
        return self._topology.world_size if self._topology else 1

    def agree(self, make_plan: Callable[[], Plan]) -> Plan:
        """Collective: rank 0's plan, or its UserError, for all."""
        self.plan = self._topology.from_main(make_plan) if self._topology else make_plan()
        return self.plan

    def take(self) -> Piece | None:
        """The next piece, which is then nobody else's; None when there are no more."""
        place = self._count("taken", 1) - 1
        return self.plan.pieces[place] if place < len(self.plan.pieces) else None

    def done(self, encoder: int, items: int = 0, cost: int = 0) -> tuple[int, float]:
        """Tell of work that is done.  Returns what all ranks have done with this encoder: the items, and the share of its work."""
        items, cost = self._count(f"items of {encoder}", items), self._count(f"cost of {encoder}", cost)
        return items, cost / max(1, self.plan.cost(encoder))

    def leave(self, broken: list[Broken]) -> None:
        """Tell that this rank takes no more pieces, and that what it has made is in the folder, but for what was broken."""
        if self._topology is None:
            self._last = broken
        else:
            self._topology.post(self._key(f"left {self._topology.rank}"), json.dumps([each.to_json() for each in broken]))

    def broken(self) -> list[Broken] | None:
        """What was broken for any rank, the same on each; None while one of them still works."""
        if self._topology is None:
            return self._last
        texts = self._topology.posted([self._key(f"left {rank}") for rank in range(self.size)])
        return None if texts is None else [Broken.from_json(told) for text in texts for told in json.loads(text)]

    def all(self, mine: bool) -> bool:
        """Collective: whether all ranks say True."""
        return all(self._topology.gather(mine)) if self._topology else mine

    def _key(self, what: str) -> str:
        return f"encoding {self.plan.name} {what}"

    def _count(self, what: str, amount: int) -> int:
        if self._topology:
            return self._topology.count(self._key(what), amount)
        self._alone[what] = self._alone.get(what, 0) + amount
        return self._alone[what]
