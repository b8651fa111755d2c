"""T5 v1.1's encoder (T5-XXL in FLUX.1 and SD3) as a frozen encoder.

Files have transformers' names: those of a diffusers folder and ComfyUI's ``t5xxl_fp16.safetensors``.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from models.common.latent_encoders import FrozenEncoder
from models.common.networks import Config, Names, Network, OpenedNetwork
from models.common.text_encoders import SPIECE_TENSOR, Tokenize, TokenizerFile
from utils.data.encoders import EncodeItem, TokenLength
from utils.weights.keymap import KeyMap, Rename

TIED = "encoder.embed_tokens.weight"
"""Another name of ``shared.weight``; files hold it or not."""
PAD = 0
WEIGHTS = (
    "shared.weight",
    "encoder.final_layer_norm.weight",
    "encoder.block.{i}.layer.0.layer_norm.weight",
    *(f"encoder.block.{{i}}.layer.0.SelfAttention.{name}.weight" for name in ("q", "k", "v", "o", "relative_attention_bias")),
    "encoder.block.{i}.layer.1.layer_norm.weight",
    *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")),
)


def t5_key_map(prefixes: tuple[str, ...] = ()) -> KeyMap:
    """The names are the same everywhere.  ``prefixes``: where the encoder is inside a checkpoint of the whole model."""
    return KeyMap([Rename(name, name) for name in WEIGHTS], prefixes=prefixes, ignored=(TIED, SPIECE_TENSOR, "logit_scale"))


def t5_config(names: Names, given: Config | None) -> Config:
    """The arguments of ``T5Config``, read from the tensors; the config tells what they do not."""
    vocabulary, width = names["shared.weight"].shape
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    buckets, heads = names[f"{attention}.relative_attention_bias.weight"].shape
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": names[f"{attention}.q.weight"].shape[0] // heads,
        "d_ff": names[f"{feed_forward}.wi_0.weight"].shape[0],
        "num_layers": len({name.split(".")[2] for name in names if name.startswith("encoder.block.")}),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
    }
    known = ("relative_attention_max_distance", "layer_norm_epsilon")
    return {**{name: given[name] for name in known if name in (given or {})}, **sizes}


def t5_network(prefixes: tuple[str, ...] = ()) -> Network:
    """How the text encoder is read; its ``width`` is that of its states."""
    return Network(
        title="T5 text encoder",
        key_map=lambda: t5_key_map(prefixes),
        kinds=("t5",),
        config=t5_config,
        build=lambda config: T5EncoderModel(T5Config(**config)),
        width=lambda config: config["d_model"],
        optional=frozenset([TIED]),
    )


class T5TextEncoder(FrozenEncoder):
    """A caption to ``text`` [max_tokens, width]: the last hidden states of its tokens and of the padding.

    The caption is cut to ``max_tokens``, the end token among them, and padded to that length before the encoder, without a mask, as
    FLUX.1 and SD3 were trained: the states of the prompt depend on the padding, and those of the padding are read too.
    """

    name = "t5"
    reads = "caption"

    def __init__(self, opened: OpenedNetwork, tokenizer: TokenizerFile, dtype: torch.dtype, max_tokens: int):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config, self.tokenizer, self.max_tokens = opened.config, tokenizer, max_tokens
        self._tokenize: Tokenize | None = None

    def settings(self) -> dict[str, Any]:
        tokenizer = hashlib.blake2b(self.tokenizer.read(), digest_size=16).hexdigest()
        return {"config": self.config, "tokenizer": tokenizer, "max_tokens": self.max_tokens}

    def load(self, device: torch.device) -> None:
        self._tokenize = self.tokenizer.load_for(self.config["vocab_size"], self.max_tokens)
        super().load(device)

    def unload(self) -> None:
        self._tokenize = None
        super().unload()

    def token_lengths(self, captions: Sequence[str], controls: int = 0) -> list[TokenLength]:
        return self.tokenizer.lengths(captions, self.config["vocab_size"], self.max_tokens)

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"text": self._states(item.caption)} for item in items]

    def token_ids(self, caption: str) -> Tensor:
        """[1, max_tokens] int64."""
        ids = self._tokenize(caption)
        return torch.tensor([[*ids, *[PAD] * (self.max_tokens - len(ids))]], device=self.device)

    def _states(self, caption: str) -> Tensor:
        return self.network(input_ids=self.token_ids(caption)).last_hidden_state[0].cpu()
