"""Captions to the token ids that FLUX.2's language models read: chats in the tokenizer's own template, padded to 512.

The transformer reads all 512 positions without a mask, so the padding and its side are part of what it was trained with.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.errors import UserError

TOKENS = 512
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What decides the ids."""


@dataclass(frozen=True)
class TokenIds:
    """Both [1, 512] int64, or as long as the chat is."""

    ids: Tensor
    mask: Tensor
    """1 where a token is, 0 on padding; for the language model alone."""


CUT = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
"""How the chats are tokenized for the language model."""
WHOLE = {"truncation": True, "max_length": 1 << 30}
"""How they are as long as they are, without transformers' warning that this is too long."""


def _mistral(tokenizer: PreTrainedTokenizerBase, caption: str, cut: Mapping[str, Any] = CUT) -> TokenIds:
    """As diffusers' Flux2Pipeline: a system message, the caption without marks of pictures, no start of an answer."""
    chat = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
        {"role": "user", "content": [{"type": "text", "text": caption.replace("[IMG]", "")}]},
    ]
    encoded = tokenizer.apply_chat_template(
        [chat],
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **cut,
    )
    return TokenIds(encoded["input_ids"], encoded["attention_mask"])


def _qwen3(tokenizer: PreTrainedTokenizerBase, caption: str, cut: Mapping[str, Any] = CUT) -> TokenIds:
    """As diffusers' Flux2KleinPipeline: the caption as the user's turn, then the start of an answer without thoughts."""
    chat = [{"role": "user", "content": caption}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    encoded = tokenizer(text, return_tensors="pt", **cut)
    return TokenIds(encoded["input_ids"], encoded["attention_mask"])


CHATS: dict[str, Callable[..., TokenIds]] = {"mistral": _mistral, "qwen3": _qwen3}
"""By the kind of the language model."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer's folder, as transformers writes it."""

    folder: Path

    def identity(self) -> str:
        """Hash of what decides the ids."""
        digest = hashlib.blake2b(digest_size=16)
        for name in FILES:
            file = self.folder / name
            digest.update(f"{name} {file.stat().st_size}\n".encode() + file.read_bytes() if file.is_file() else b"")
        return digest.hexdigest()

    def problem(self) -> str | None:
        """What keeps it from being used, to be reported before anything is loaded."""
        if not (self.folder / "tokenizer_config.json").is_file():
            return f"the tokenizer in {self.folder} has no tokenizer_config.json beside it, which says how to pad"
        config = (self.folder / "tokenizer_config.json").read_text("utf-8")
        if not (self.folder / "chat_template.jinja").is_file() and '"chat_template"' not in config:
            return f"the tokenizer in {self.folder} has no chat template (chat_template.jinja)"
        return None

    def load(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """UserError if it is damaged, or has more tokens than the language model knows."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise UserError(f"{self.folder}: the tokenizer in it cannot be read ({error}); download it again") from error
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"{self.folder} has {len(tokenizer)} tokens, the text encoder knows {vocabulary}: they do not belong together; "
                "name the tokenizer's folder with model.tokenizer_path"
            )
        return tokenizer
