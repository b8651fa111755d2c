"""SDXL's frozen networks as encoders whose outputs are cached.

The text encoders run in the config's ``dtype`` as plain modules of that dtype, never under autocast; the VAE always in fp32: its
activations overflow in half precision (``force_upcast`` in its config).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from models.common.clip import ClipTextEncoder
from models.common.kl_encoders import KlVaeEncoder
from models.sdxl.files import SdxlFiles
from models.sdxl.options import SdxlOptions
from models.sdxl.text_encoders import TEXT_ENCODERS, trained_text_encoders
from models.sdxl.tokens import CHUNK, TokenEncoder, token_rows
from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.media.pixels import covering
from utils.data.values import CENTRE
from utils.runtime import DTYPES


def sdxl_encoders(files: SdxlFiles, options: SdxlOptions) -> list[ConditionEncoder]:
    """The encoders, unloaded.  Of a text encoder that is trained the token ids are cached."""
    encoders: list[ConditionEncoder] = [SdxlVaeEncoder(files.vae, torch.float32)]
    trained, dtype, chunks = trained_text_encoders(options), DTYPES[options.dtype], options.max_prompt_chunks
    for name, kind in FROZEN.items():
        if name not in trained:
            arguments = (getattr(files, name), files.tokenizer, dtype, TEXT_ENCODERS[name].pad)
            encoders.append(kind(*arguments, chunks=chunks, clip_skip=options.clip_skip))
    if trained:
        vocabulary = min(getattr(files, name).config["vocab_size"] for name in trained)
        pads = {TEXT_ENCODERS[name].tower: TEXT_ENCODERS[name].pad for name in trained}
        encoders.append(TokenEncoder(files.tokenizer, vocabulary, pads=pads, chunks=chunks))
    return encoders


class SdxlVaeEncoder(KlVaeEncoder):
    """A picture to ``latents`` [4, 1, h, w], fp32, and ``time_ids`` [6], int64: what SDXL is told of its size.

    The time ids are the height and width of the file, the top and left of what is used of it in the scaled picture, and the height
    and width that it is trained at.  A box that was chosen counts as a crop: its own top and left are in there.  An item whose
    original size is not known counts as one of the size that it has.
    """

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [fields | {"time_ids": time_ids(item)} for fields, item in zip(super().encode(items), items, strict=True)]


def time_ids(item: EncodeItem) -> Tensor:
    height, width = item.pixels.shape[2:]
    original, framing = (item.original_size, item.framing) if item.original_size else ((width, height), CENTRE)
    left, top = covering(original, (width, height), framing).corner(original)
    return torch.tensor([original[1], original[0], top, left, height, width])


class ChunkedClipEncoder(ClipTextEncoder):
    """A caption to states [77 n, width] of n chunks of 75 tokens (see ``tokens.py``).

    The states are those of the last but one layer, without the final norm; ``clip_skip`` leaves out more.
    """

    field: ClassVar[str]
    """Name of the states among the cached fields."""
    gives_pooled: ClassVar[bool] = False

    def __init__(self, *arguments: Any, chunks: int, clip_skip: int):
        super().__init__(*arguments)
        self.chunks, self.clip_skip, self.max_tokens = chunks, clip_skip, chunks * CHUNK + 2

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "chunks": self.chunks, "clip_skip": self.clip_skip}

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [self._fields(item.caption) for item in items]

    def _fields(self, caption: str) -> dict[str, Tensor]:
        texts = [self.states(row[None]) for row in self.token_ids(caption)]
        hidden = torch.cat([text.hidden[-2 - self.clip_skip] for text in texts])
        return {self.field: hidden.cpu(), **({"pooled": texts[0].pooled.cpu()} if self.gives_pooled else {})}

    def token_ids(self, caption: str) -> Tensor:
        """[n, 77] int64."""
        return token_rows(self._tokenize, caption, self.pad).to(self.device)


class ClipLEncoder(ChunkedClipEncoder):
    """CLIP-L: ``text_l`` [77 n, 768]."""

    name = "clip_l"
    field = "text_l"


class ClipGEncoder(ChunkedClipEncoder):
    """CLIP-G: ``text_g`` [77 n, 1280], and ``pooled`` [1280] of the first chunk."""

    name = "clip_g"
    field = "text_g"
    gives_pooled = True


FROZEN: dict[str, type[ChunkedClipEncoder]] = {"text_encoder": ClipLEncoder, "text_encoder_2": ClipGEncoder}
