"""What one rank encodes of a build."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch

from utils import words
from utils.data.cache.keys import Input
from utils.data.cache.memory import Fitting
from utils.data.cache.reading import DECODED_BYTES_AHEAD, ItemReader, Work
from utils.data.cache.shards import ABOUT, ShardWriter, write_atomically
from utils.data.cache.sharing import Broken, Piece, Team, cost_of, shape_of
from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.media.pixels import MediaError
from utils.data.progress import ProgressLog

log = logging.getLogger(__name__)

TELL_SECONDS = 1.0
"""How often a rank tells the others how far it is."""


Batch = tuple[list[str], list[EncodeItem], str, int]
"""Keys, items, shape and cost of what an encoder gets at once."""


class RankEncoding:
    """Takes pieces until there are no more, encodes them, and writes shards.  A network is loaded if there is something for it."""

    def __init__(self, team: Team, device: torch.device, batch_size: int, stop: Callable[[], bool]):
        self.team, self.device, self.batch_size, self.stop = team, device, batch_size, stop
        self.broken: list[Broken] = []
        self._reader = ItemReader()
        self._held: Piece | None = None

    def run(
        self,
        encoders: Sequence[ConditionEncoder],
        inputs: Sequence[dict[str, Input]],
        writer_for: Callable[[ConditionEncoder], ShardWriter],
    ) -> list[int]:
        """Returns how many items of each encoder were encoded here.  Files that could not be read are then in ``broken``."""
        return [
            self._encode(place, encoder, inputs[place], writer_for(encoder)) if self.team.plan.missing[place] else 0
            for place, encoder in enumerate(encoders)
        ]

    def _pieces(self, place: int) -> Iterator[Piece]:
        """The pieces of one encoder.  The first piece of a later one is kept for its turn."""
        while not self.stop():
            piece = self._held or self.team.take()
            self._held = None
            if piece is None or piece.encoder != place:
                self._held = piece
                return
            yield piece

    def _encode(self, place: int, encoder: ConditionEncoder, inputs: dict[str, Input], writer: ShardWriter) -> int:
        missing = self.team.plan.missing[place]
        log.info(
            "%s: %d to encode; on each rank up to %s of decoded pixels wait for it, and %s for the next file of the cache",
            *(encoder.name, missing, words.size(DECODED_BYTES_AHEAD), words.size(writer.max_bytes)),
        )
        progress = Progress(self.team, place, ProgressLog(f"encoding with {encoder.name}", missing))
        fitting = Fitting(encoder)
        work = ([(key, inputs[key]) for key in piece.keys] for piece in self._pieces(place))
        encoded, loaded = 0, False
        try:
            with closing(self._batches(encoder, work)) as batches:
                for keys, items, shape, cost in batches:
                    if self.stop():
                        break
                    if not loaded:
                        _write_about(encoder, writer)
                        loaded = True
                        encoder.load(self.device)
                    for key, fields in zip(keys, fitting.encode(items, shape), strict=True):
                        writer.add(key, fields)
                    encoded += len(keys)
                    progress.add(len(keys), cost)
        finally:
            # Also when the encoder failed: what it has made is kept.
            try:
                writer.flush()
            finally:
                if loaded:
                    encoder.unload()
        progress.tell()
        return encoded

    def _batches(self, encoder: ConditionEncoder, work: Iterator[list[Work]]) -> Iterator[Batch]:
        """The items of the pieces, as far as they can be read, in batches of one shape."""
        keys: list[str] = []
        items: list[EncodeItem] = []
        shape, cost = "", 0
        with closing(self._reader.ahead(work, encoder)) as ahead:
            for (key, entry), item in ahead:
                if isinstance(item, MediaError):
                    self.broken.append(Broken(item.file, item.reason, (key,)))
                    continue
                if keys and (len(keys) == self.batch_size or shape_of(entry, encoder) != shape):
                    yield keys, items, shape, cost
                    keys, items, cost = [], [], 0
                keys.append(key)
                items.append(item)
                shape, cost = shape_of(entry, encoder), cost + cost_of(entry, encoder)
        if keys:
            yield keys, items, shape, cost


class Progress:
    """How far all ranks are with one encoder."""

    def __init__(self, team: Team, place: int, progress: ProgressLog):
        self._team, self._place, self._log = team, place, progress
        self._items = self._cost = 0
        self._told = time.monotonic()
        self.tell()

    def add(self, items: int, cost: int) -> None:
        self._items, self._cost = self._items + items, self._cost + cost
        if time.monotonic() - self._told > TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        items, share = self._team.done(self._place, self._items, self._cost)
        self._items = self._cost = 0
        self._told = time.monotonic()
        self._log.report(items, share)


def _write_about(encoder: ConditionEncoder, writer: ShardWriter) -> None:
    """For people who look at the folder."""
    if not (writer.folder / ABOUT).exists():
        write_atomically(writer.folder / ABOUT, json.dumps(encoder.about(), indent=2, sort_keys=True).encode())
