"""CLIP's text tower as a frozen encoder: CLIP-L (FLUX.1, SD3, SDXL) and OpenCLIP's bigG (SD3, SDXL).

Files have transformers' names: those of a diffusers folder and ComfyUI's ``clip_l.safetensors`` and ``clip_g.safetensors``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.common.latent_encoders import FrozenEncoder
from models.common.networks import Config, Names, Network, OpenedNetwork
from models.common.text_encoders import Tokenize, TokenizerFile
from utils.data.encoders import EncodeItem, TokenLength
from utils.errors import UserError
from utils.weights.keymap import KeyMap, Rename, Rule

TOKENS = 77
"""Length of CLIP's text, the start and the end token among them; the model has no more positions."""
HEAD_DIM = 64
"""Width of a head: 768 / 12 in CLIP-L, 1280 / 20 in bigG."""

EMBEDDINGS = {
    "embeddings.token_embedding.weight": "embeddings.token_embedding.weight",
    "embeddings.position_embedding.weight": "embeddings.position_embedding.weight",
    "final_layer_norm.{p}": "final_layer_norm.{p}",
}
LAYER = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
TEXT_MODEL = {**EMBEDDINGS, **{f"encoder.layers.{{i}}.{name}.{{p}}": f"encoder.layers.{{i}}.{name}.{{p}}" for name in LAYER}}
UNUSED = ("logit_scale", "text_model.embeddings.position_ids", "embeddings.position_ids")
"""Held by files that were made of the whole CLIP, or by older transformers."""


def clip_text_key_map(projection: bool, prefixes: tuple[str, ...] = ()) -> KeyMap:
    """transformers' names in memory, and those in files.

    ``CLIPTextModel`` itself has no ``text_model.`` before its names since transformers 5, the files of the releases have it;
    ``CLIPTextModelWithProjection`` has it in both.  ``prefixes``: where the encoder is inside a checkpoint of the whole model.
    """
    if not projection:
        rules: list[Rule] = [Rename(ours, f"text_model.{theirs}") for ours, theirs in TEXT_MODEL.items()]
        return KeyMap(rules, prefixes=prefixes, ignored=(*UNUSED, "text_projection.weight"))
    rules = [Rename(f"text_model.{name}", f"text_model.{name}") for name in TEXT_MODEL]
    return KeyMap([*rules, Rename("text_projection.weight", "text_projection.weight")], prefixes=prefixes, ignored=UNUSED)


def clip_text_network(title: str, *, projection: bool, activation: str, prefixes: tuple[str, ...] = ()) -> Network:
    """How a CLIP text encoder is read; its ``width`` is that of the pooled output.

    ``activation``: ``quick_gelu`` for CLIP-L, ``gelu`` for bigG; no tensor tells it.
    """
    start = "text_model." if projection else ""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel

    def config(names: Names, given: Config | None) -> Config:
        vocabulary, width = names[f"{start}embeddings.token_embedding.weight"].shape
        layers = {name.split("encoder.layers.")[1].split(".")[0] for name in names if "encoder.layers." in name}
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": names[f"{start}encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": len(layers),
            "max_position_embeddings": names[f"{start}embeddings.position_embedding.weight"].shape[0],
            "projection_dim": names["text_projection.weight"].shape[0] if projection else width,
        }
        told = {name: given[name] for name in ("num_attention_heads", "hidden_act", "layer_norm_eps") if name in (given or {})}
        # The start and end tokens are the last two of CLIP's vocabulary.  (Old configs name wrong ones.)
        ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
        return {"num_attention_heads": _heads(width, told), "hidden_act": activation, **told, **ends, **sizes}

    def build(config: Config) -> nn.Module:
        model = kind(CLIPTextConfig(**config))
        embeddings = model.text_model.embeddings if projection else model.embeddings
        # Not a weight, so nothing would fill it when the model is made on meta.
        positions = torch.arange(config["max_position_embeddings"], device="cpu").expand(1, -1)
        embeddings.register_buffer("position_ids", positions, persistent=False)
        return model

    return Network(
        title=title,
        key_map=lambda: clip_text_key_map(projection, prefixes),
        kinds=("clip_text_model",),
        config=config,
        build=build,
        width=lambda config: config["projection_dim"],
        in_folder="diffusers" if projection else "released",
    )


def _heads(width: int, told: Config) -> int:
    if "num_attention_heads" not in told and width % HEAD_DIM:
        raise UserError(
            f"its width {width} is not a multiple of {HEAD_DIM}, the width of a head in the released CLIP; "
            "put the encoder's config.json beside the file, it tells the number of heads"
        )
    return told.get("num_attention_heads", width // HEAD_DIM)


@dataclass(frozen=True)
class ClipText:
    """What CLIP makes of one caption."""

    hidden: tuple[Tensor, ...]
    """[L, width] after the embeddings and after each layer, none with the final norm: ``hidden[-2]`` is what SDXL and SD3 read."""
    pooled: Tensor
    """[width]: the state at the end token after the final norm, and after the projection if the encoder has one."""


class ClipTextEncoder(FrozenEncoder):
    """A caption to ``pooled`` [width].  Families that want other states override :meth:`fields`.

    The caption is cut to 77 tokens and padded to 77: with the end token (CLIP-L), or with token 0 (bigG).  There is no mask.
    """

    name = "clip"
    reads = "caption"
    max_tokens = TOKENS
    """The start and the end token among them."""

    def __init__(self, opened: OpenedNetwork, tokenizer: TokenizerFile, dtype: torch.dtype, pad: Literal["end", "zero"] = "end"):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config, self.tokenizer, self.pad = opened.config, tokenizer, pad
        self._tokenize: Tokenize | None = None

    def settings(self) -> dict[str, Any]:
        tokenizer = hashlib.blake2b(self.tokenizer.read(), digest_size=16).hexdigest()
        return {"config": self.config, "tokenizer": tokenizer, "pad": self.pad}

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
        return [self.fields(self.states(self.token_ids(item.caption))) for item in items]

    def fields(self, text: ClipText) -> dict[str, Tensor]:
        """What is cached of a caption."""
        return {"pooled": text.pooled.cpu()}

    def token_ids(self, caption: str) -> Tensor:
        """[1, 77] int64."""
        ids = self._tokenize(caption)
        end = self.config["eos_token_id"]
        padding = end if self.pad == "end" else 0
        return torch.tensor([[*ids, *[padding] * (TOKENS - len(ids))]], device=self.device)

    def states(self, ids: Tensor) -> ClipText:
        """The encoder's states of one row of token ids."""
        output = self.network(input_ids=ids, output_hidden_states=True)
        pooled = output.text_embeds if isinstance(self.network, CLIPTextModelWithProjection) else output.pooler_output
        return ClipText(tuple(state[0] for state in output.hidden_states), pooled[0])
