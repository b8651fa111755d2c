"""What a frozen network must offer so that its output can be cached.  The cache does not know which one is a VAE."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from utils.data.values import CENTRE, Framing


@dataclass(frozen=True)
class EncodeItem:
    """One thing to encode.

    ``pixels``, fp32 [3, frames, height, width] in [-1, 1], for encoders that look; ``caption`` for those that read; ``controls``,
    each like the pixels of a picture, for those that look at the control pictures.  ``original_size``: (width, height) of the file
    that the pixels were scaled and cropped from, as ``framing`` says (``media.covering`` tells how), if it is known.
    ``known_frames``: given pictures in place of the clip's own first or last frame, each like the pixels of a picture.  ``mask``,
    fp32 [1, frames, height, width] in [0, 1], for encoders that read masks.
    """

    key: str
    caption: str | None = None
    pixels: Tensor | None = None
    controls: tuple[Tensor, ...] = ()
    original_size: tuple[int, int] | None = None
    framing: Framing = CENTRE
    known_frames: Mapping[Literal["first", "last"], Tensor] = field(default_factory=dict)
    mask: Tensor | None = None


@dataclass(frozen=True)
class TokenLength:
    """How long a caption is for an encoder."""

    tokens: int
    """All that the encoder would be given: the caption's, and those of the template and of its ends."""
    limit: int
    """So many are read; what is behind them is cut off."""

    @property
    def is_cut(self) -> bool:
        return self.tokens > self.limit


class ConditionEncoder(ABC):
    """A frozen network whose output is computed once and cached: a VAE, a text encoder, an image encoder."""

    name: ClassVar[str]
    """Folder name in the cache (``vae``, ``text``, ``clip``)."""
    reads: ClassVar[Literal["pixels", "caption", "controls", "caption and controls", "mask"]]
    """What of a sample goes in, and so what its cache key is made of."""
    max_frames: int | None = None
    """Of a clip's pixels only so many frames, from the first on, are decoded for it; None: all of them."""
    known_frames: tuple[Literal["first", "last"], ...] = ()
    """The frames of a clip of which it takes given pictures instead, where a sample has such."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Text that changes whenever the output for the same input may: weights' identity, settings, a version of the code."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Bring the network to the device.  Called on each rank that has something to encode."""

    @abstractmethod
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        """Named CPU tensors for each item, without a batch dimension.  All pixels in one call have the same shape."""

    def use_tiles(self, on: bool) -> bool:
        """Work on parts of the pixels in turn, from now on or no longer: less memory, and values that differ a little.

        Called between ``load`` and ``unload``.  False: it cannot.
        """
        return False

    def about(self) -> dict[str, Any]:
        """What the cache says of its outputs, for people: JSON values without paths."""
        return {"encoder": self.name, "class": type(self).__name__}

    @abstractmethod
    def unload(self) -> None:
        """Give the memory back."""

    def token_lengths(self, captions: Sequence[str], controls: int = 0) -> list[TokenLength]:
        """How long each caption is, with ``controls`` control pictures beside it, by the tokenizer alone: no weights are read.

        None for encoders that read no captions.  UserError if the tokenizer cannot be used.
        """
        return []
