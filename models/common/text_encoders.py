"""Captions to token ids: what text encoders of several families share."""

import html
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ftfy
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, Qwen2Tokenizer

from utils.data.encoders import TokenLength
from utils.errors import UserError
from utils.weights.tensor_files import open_tensor_file

SPIECE_TENSOR = "spiece_model"
"""Name under which ComfyUI's text encoder files carry their sentencepiece model, as bytes."""
NAMES = {"tokenizer.json": "json", "spiece.model": "spiece"}
"""Tokenizer files of T5 and its kin by preference: the first kind needs no further package."""
CLIP_NAMES = {"tokenizer.json": "json", "vocab.json": "clip"}
"""Tokenizer files of CLIP.  Releases have ``vocab.json`` with ``merges.txt`` beside it."""
QWEN_NAMES = {"tokenizer.json": "json", "vocab.json": "qwen"}
"""Tokenizer files of Qwen 2 and 2.5, in the same way."""
MERGES = "merges.txt"
QWEN_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Of Qwen 2 and 2.5, in the order of their ids, which follow those of the vocabulary."""


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
    """Where a tokenizer is: a file of one of the tables above, or a text encoder's file that carries it as a tensor."""

    path: Path
    kind: Literal["json", "spiece", "tensor", "clip", "qwen"]

    def read(self) -> bytes:
        """The tokenizer's bytes, its identity."""
        if self.kind == "tensor":
            return open_tensor_file(self.path).read(SPIECE_TENSOR).numpy().tobytes()
        if self.kind in ("clip", "qwen"):
            return json.dumps([self.path.read_text("utf-8"), self.path.with_name(MERGES).read_text("utf-8")]).encode()
        return self.path.read_bytes()

    def problem(self) -> str | None:
        """What keeps it from being used, to be reported before anything is loaded."""
        if self.kind in ("clip", "qwen") and not self.path.with_name(MERGES).is_file():
            return f"the tokenizer {self.path} has no {MERGES} beside it; download it again"
        if self.kind in ("json", "clip", "qwen") or importlib.util.find_spec("sentencepiece"):
            return None
        return (
            f"the tokenizer in {self.path} is a sentencepiece model, and the package sentencepiece is not installed: "
            'pip install "flowstage[sentencepiece]", or name a folder with a tokenizer.json with model.tokenizer_path'
        )

    def load(self, max_tokens: int | None) -> Tokenize:
        """The tokenizer, with the end token among the ``max_tokens``; None: nothing is cut.  UserError if the file is damaged."""
        try:
            return LOADERS[self.kind](self.read(), max_tokens)
        except Exception as error:  # the libraries raise bare Exception and RuntimeError
            raise UserError(f"{self.path}: the tokenizer in it cannot be read ({error}); download it again") from error

    def load_for(self, vocabulary: int, max_tokens: int | None) -> Tokenize:
        """:meth:`load`, and UserError if the tokenizer has more tokens than the text encoder knows."""
        tokenize = self.load(max_tokens)
        if tokenize.vocabulary > vocabulary:
            raise UserError(
                f"{self.path} has {tokenize.vocabulary} tokens, the text encoder knows {vocabulary}: they do not belong together; "
                "name the folder of the right tokenizer in [model] (see configs/README.md)"
            )
        return tokenize

    def lengths(self, texts: Iterable[str], vocabulary: int, max_tokens: int) -> list[TokenLength]:
        """How long each text is, before it is cut to ``max_tokens``.  UserError as of :meth:`load_for`."""
        tokenize = self.load_for(vocabulary, None)
        return [TokenLength(len(tokenize(text)), max_tokens) for text in texts]


def find_tokenizer(path: Path, names: Mapping[str, str] = NAMES) -> TokenizerFile | None:
    """The tokenizer in a folder, or the one that a file is.  ``names``: the files it may be in, by preference, and their kinds."""
    if path.name in names and path.is_file():
        return TokenizerFile(path, names[path.name])
    return next((TokenizerFile(path / name, kind) for name, kind in names.items() if (path / name).is_file()), None)


def tokenizer_inside(weights: Path) -> TokenizerFile | None:
    """The tokenizer that a text encoder's file carries, if it does."""
    if weights.is_file() and SPIECE_TENSOR in open_tensor_file(weights).entries:
        return TokenizerFile(weights, "tensor")
    return None


def _load_json(content: bytes, max_tokens: int | None) -> Tokenize:
    # The file is the whole tokenizer.  transformers' classes would rebuild parts of it, in several times the time.
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    if max_tokens is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_tokens)
    return Tokenize(lambda text: tokenizer.encode(text).ids, tokenizer.get_vocab_size())


def _load_spiece(content: bytes, max_tokens: int | None) -> Tokenize:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=content)
    room = None if max_tokens is None else max_tokens - 1
    return Tokenize(lambda text: [*processor.encode(text)[:room], processor.eos_id()], processor.vocab_size())


def _load_clip(content: bytes, max_tokens: int | None) -> Tokenize:
    vocabulary, merges = json.loads(content)
    # The first line is a comment with the version.
    pairs = [tuple(line.split()) for line in merges.strip().split("\n")[1:]]
    made = CLIPTokenizer(vocab=json.loads(vocabulary), merges=pairs)
    return _load_json(made.backend_tokenizer.to_str().encode(), max_tokens)


def _load_qwen(content: bytes, max_tokens: int | None) -> Tokenize:
    vocabulary, merges = json.loads(content)
    pairs = [tuple(line.split(" ")) for line in merges.strip().split("\n") if not line.startswith("#version")]
    made = Qwen2Tokenizer(vocab=json.loads(vocabulary), merges=pairs)
    made.add_tokens(list(QWEN_SPECIAL_TOKENS), special_tokens=True)
    return _load_json(made.backend_tokenizer.to_str().encode(), max_tokens)


LOADERS = {"json": _load_json, "spiece": _load_spiece, "tensor": _load_spiece, "clip": _load_clip, "qwen": _load_qwen}
