"""Captions to token ids: what text encoders of several families share."""

import html
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ftfy
from tokenizers import Tokenizer

from utils.checkpoints.tensor_files import open_tensor_file
from utils.errors import UserError

SPIECE_TENSOR = "spiece_model"
"""Name under which ComfyUI's text encoder files carry their sentencepiece model, as bytes."""
NAMES = {"tokenizer.json": "json", "spiece.model": "spiece"}
"""Tokenizer files by preference: the first kind needs no further package."""


def clean_caption(text: str) -> str:
    """Repair encoding, undo HTML entities (twice, for doubly escaped text), collapse white space: as Wan was trained."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class Tokenize:
    """A loaded tokenizer: caption to ids with the end token, cut to its limit, not padded."""

    encode: Callable[[str], list[int]]
    vocabulary: int
    """Ids are smaller than this."""

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


@dataclass(frozen=True)
class TokenizerFile:
    """Where a tokenizer is: a ``tokenizer.json``, a ``spiece.model``, or a text encoder's file that carries the latter."""

    path: Path
    kind: Literal["json", "spiece", "tensor"]

    def read(self) -> bytes:
        """The tokenizer's bytes, its identity."""
        if self.kind == "tensor":
            return open_tensor_file(self.path).read(SPIECE_TENSOR).numpy().tobytes()
        return self.path.read_bytes()

    def problem(self) -> str | None:
        """What keeps it from being used, to be reported before anything is loaded."""
        if self.kind == "json" or importlib.util.find_spec("sentencepiece"):
            return None
        return (
            f"the tokenizer in {self.path} is a sentencepiece model, and the package sentencepiece is not installed: "
            'pip install "flowstage[sentencepiece]", or name a folder with a tokenizer.json with model.tokenizer_path'
        )

    def load(self, max_tokens: int) -> Tokenize:
        """The tokenizer, with the end token among the ``max_tokens``.  UserError if the file is damaged."""
        try:
            return (_load_json if self.kind == "json" else _load_spiece)(self.read(), max_tokens)
        except Exception as error:  # the libraries raise bare Exception and RuntimeError
            raise UserError(f"{self.path}: the tokenizer in it cannot be read ({error}); download it again") from error


def find_tokenizer(path: Path) -> TokenizerFile | None:
    """The tokenizer in a folder, or the one that a file is."""
    if path.name in NAMES and path.is_file():
        return TokenizerFile(path, NAMES[path.name])
    return next((TokenizerFile(path / name, kind) for name, kind in NAMES.items() if (path / name).is_file()), None)


def tokenizer_inside(weights: Path) -> TokenizerFile | None:
    """The tokenizer that a text encoder's file carries, if it does."""
    if weights.is_file() and SPIECE_TENSOR in open_tensor_file(weights).entries:
        return TokenizerFile(weights, "tensor")
    return None


def _load_json(content: bytes, max_tokens: int) -> Tokenize:
    # The file is the whole tokenizer.  transformers' classes would rebuild parts of it, in several times the time.
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return Tokenize(lambda text: tokenizer.encode(text).ids, tokenizer.get_vocab_size())


def _load_spiece(content: bytes, max_tokens: int) -> Tokenize:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=content)
    return Tokenize(lambda text: [*processor.encode(text)[: max_tokens - 1], processor.eos_id()], processor.vocab_size())
