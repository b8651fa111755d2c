"""Qwen-Image's three networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from models.common.networks import Config, Network
from models.common.wan_vae import vae_key_map
from models.qwen_image.keys import EDIT_2511_MARK, qwen_key_map, text_key_map
from models.qwen_image.sizes import text_encoder_config, transformer_config, vae_config
from utils.formats.recognise import FileFacts


def build_text_encoder(config: Config) -> nn.ModuleDict:
    """Qwen2.5-VL as ``model``, without the head, so that the names are those of ``Qwen2_5_VLForConditionalGeneration``."""
    model = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config))
    # Not weights, so nothing would fill them when the model is made on meta.
    with torch.device("cpu"):
        for owner, name in ((model.language_model, "rotary_emb"), (model.visual, "rotary_pos_emb")):
            setattr(owner, name, type(getattr(owner, name))(owner.config))
    return nn.ModuleDict({"model": model})


NETWORKS = {
    "transformer": Network(
        title="Qwen-Image transformer",
        key_map=qwen_key_map,
        kinds=("QwenImageTransformer2DModel",),
        config=transformer_config,
        build=QwenImageTransformer2DModel.from_config,
        family="qwen_image",
    ),
    "vae": Network(
        title="Qwen-Image VAE",
        key_map=vae_key_map,
        kinds=("AutoencoderKLQwenImage",),
        config=vae_config,
        build=AutoencoderKLQwenImage.from_config,
        width=lambda config: config["z_dim"],
    ),
    "text_encoder": Network(
        title="Qwen2.5-VL text encoder",
        key_map=text_key_map,
        kinds=("qwen2_5_vl",),
        config=text_encoder_config,
        build=build_text_encoder,
        width=lambda config: config["text_config"]["hidden_size"],
        in_folder="released",
    ),
}


def _marks(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {EDIT_2511_MARK: torch.zeros(0)} if config["zero_cond_t"] else {}


FILE_FACTS = FileFacts(
    networks=NETWORKS,
    architecture=r"qwen",
    key_map=lambda shapes: qwen_key_map(),
    sizes={(60, 3072): "Qwen-Image"},
    marks=_marks,
    with_marks=lambda marks, config: {**config, "zero_cond_t": config["zero_cond_t"] or EDIT_2511_MARK in marks},
)
