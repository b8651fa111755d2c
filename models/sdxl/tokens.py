"""Captions to CLIP's token ids, in chunks; and the ids as what is cached of a caption whose text encoder is trained."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from models.common.clip import TOKENS
from models.common.text_encoders import Tokenize, TokenizerFile
from utils.data.encoders import ConditionEncoder, EncodeItem, TokenLength

Pad = Literal["end", "zero"]
"""What the rest of a row is filled with: the end token, or token 0."""
CHUNK = TOKENS - 2
"""Tokens of a caption that go into CLIP at a time, between the start and the end token."""


def token_rows(tokenize: Tokenize, caption: str, pad: Pad) -> Tensor:
    """[n, 77] int64: a row for every 75 tokens of the caption, each with a start and an end token of its own, padded to 77.

    As ComfyUI and sd-scripts do it; with one chunk it is what diffusers does.
    """
    start, *ids, end = tokenize(caption)
    padding = end if pad == "end" else 0
    chunks = [ids[place : place + CHUNK] for place in range(0, max(len(ids), 1), CHUNK)]
    return torch.tensor([[start, *chunk, end, *[padding] * (CHUNK - len(chunk))] for chunk in chunks])


class TokenEncoder(ConditionEncoder):
    """A caption to ``ids_<tower>`` [n, 77] int64, for text encoders that are trained and so read them in every step."""

    name = "clip_tokens"
    reads = "caption"

    def __init__(self, tokenizer: TokenizerFile, vocabulary: int, *, pads: Mapping[str, Pad], chunks: int):
        """``vocabulary``: how many tokens the text encoders know.  ``pads``: by tower what its rows are padded with."""
        self.tokenizer, self.vocabulary, self.pads, self.chunks = tokenizer, vocabulary, dict(pads), chunks
        self.max_tokens = chunks * CHUNK + 2
        self._tokenize: Tokenize | None = None

    def fingerprint(self) -> str:
        told = [hashlib.blake2b(self.tokenizer.read(), digest_size=16).hexdigest(), self.pads, self.chunks]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def load(self, device: torch.device) -> None:
        self._tokenize = self.tokenizer.load_for(self.vocabulary, self.max_tokens)

    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        assert self._tokenize is not None, "clip_tokens is used before load()"
        return [
            {f"ids_{tower}": token_rows(self._tokenize, item.caption, pad) for tower, pad in self.pads.items()} for item in items
        ]

    def unload(self) -> None:
        self._tokenize = None

    def token_lengths(self, captions: Sequence[str], controls: int = 0) -> list[TokenLength]:
        return self.tokenizer.lengths(captions, self.vocabulary, self.max_tokens)
