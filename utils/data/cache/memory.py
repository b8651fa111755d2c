"""What an encoder is given at once, so that it fits the memory."""

import gc
import logging

import torch
from torch import Tensor

from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.errors import UserError

log = logging.getLogger(__name__)

CPU_MESSAGES = ("DefaultCPUAllocator", "not enough memory: you tried to allocate")
"""How torch says that the host's memory is too small; it has no exception of its own for that."""


class Fitting:
    """An encoder that gets fewer items, and then parts of their pixels, where the memory does not hold what they need.

    What was too much for one shape is remembered for that shape alone: smaller ones are encoded as always.
    """

    def __init__(self, encoder: ConditionEncoder):
        self.encoder = encoder
        self._most: dict[str, int] = {}
        self._tiled: set[str] = set()
        self._tiles = False

    def encode(self, items: list[EncodeItem], shape: str) -> list[dict[str, Tensor]]:
        """The encoder's outputs for items of one shape.  UserError for an item that does not fit even alone and in tiles."""
        outputs: list[dict[str, Tensor]] = []
        while items:
            now = items[: self._most.get(shape, len(items))]
            if (made := self._tried(now, shape)) is None:
                self._spare(now, shape)
                continue
            outputs += made
            items = items[len(now) :]
        return outputs

    def _tried(self, items: list[EncodeItem], shape: str) -> list[dict[str, Tensor]] | None:
        """None if the memory is too small."""
        if self._tiles != (shape in self._tiled):
            self._tiles = not self._tiles
            self.encoder.use_tiles(self._tiles)
        try:
            return self.encoder.encode(items)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only here is the error gone, and with it what its frames held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _spare(self, items: list[EncodeItem], shape: str) -> None:
        """Ask for less from now on."""
        what = f"{self.encoder.name}: the memory is too small for"
        of_shape = f" of {shape}" if shape else ""
        if len(items) > 1:
            self._most[shape] = len(items) // 2
            log.warning("%s %d items%s at once (%s, …): from now on %d", what, len(items), of_shape, items[0].key, len(items) // 2)
        elif shape not in self._tiled and self.encoder.use_tiles(True):
            self._tiles = True
            self._tiled.add(shape)
            log.warning("%s %s%s: those%s are encoded in tiles from now on", what, items[0].key, of_shape, of_shape)
        else:
            tiles = ", not even in tiles" if shape in self._tiled else ""
            raise UserError(
                f"{what} {items[0].key}{of_shape}, alone{tiles}. Use smaller resolutions or frame_buckets or leave this file out, "
                "or encode on a device with more memory: --cache-only does that apart, and the cache can be used elsewhere. "
                "What is encoded is kept"
            )


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in CPU_MESSAGES)
