"""FLUX.1's four networks, with the sizes that are read from the tensors: a single file is enough for a released model."""

from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel

from models.common.clip import clip_text_network
from models.common.kl_vae import kl_vae_key_map, kl_vae_sizes, refuse_other_scale
from models.common.networks import Config, Names, Network
from models.common.t5 import t5_network
from models.flux.keys import flux_key_map
from utils.errors import UserError, listed
from utils.formats.recognise import FileFacts

LATENT_CHANNELS = 16
OTHERS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}
"""Models of the same names by the width of their picture tokens, which hold more than latents."""
VAE_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
"""Of FLUX.1's VAE; no tensor tells them."""


def transformer_config(names: Names, given: Config | None) -> Config:
    """The arguments of ``FluxTransformer2DModel``.  UserError if ``config.json`` says something else than the tensors."""
    width, channels = names["x_embedder.weight"].shape
    head_dim = names["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    config = {
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": _count(names, "transformer_blocks."),
        "num_single_layers": _count(names, "single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": names["context_embedder.weight"].shape[1],
        "pooled_projection_dim": names["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in names,
        "axes_dims_rope": transformer_axes(head_dim),
    }
    different = [
        f"{name}: {value} in config.json, {config[name]} by the weights"
        for name, value in (given or {}).items()
        if name in config and value != (list(config[name]) if isinstance(config[name], tuple) else config[name])
    ]
    if different:
        raise UserError(listed(different, "config.json is of another model:"))
    return config


def _count(names: Names, prefix: str) -> int:
    """Number of blocks ``<prefix>0.``, ``<prefix>1.``, …"""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def transformer_axes(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared by index, row and column: 16, 56 and 56 of 128 in every release."""
    return head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16


def _accept(config: dict[str, Any]) -> None:
    channels = config["in_channels"]
    if channels != 4 * LATENT_CHANNELS:
        what = OTHERS.get(channels, f"a FLUX model with picture tokens {channels} wide")
        raise UserError(f"this is {what}, which is not trained here; supported are FLUX.1 dev, schnell and Kontext")


def _vae_config(names: Names, given: Config | None) -> Config:
    return {**VAE_SCALE, **kl_vae_sizes(names, given)}


NETWORKS = {
    "transformer": Network(
        title="FLUX.1 transformer",
        key_map=flux_key_map,
        kinds=("FluxTransformer2DModel",),
        config=transformer_config,
        build=FluxTransformer2DModel.from_config,
        accept=_accept,
        family="flux",
    ),
    "vae": Network(
        title="FLUX.1 VAE",
        key_map=kl_vae_key_map,
        kinds=("AutoencoderKL",),
        config=_vae_config,
        build=AutoencoderKL.from_config,
        width=lambda config: config["latent_channels"],
        accept=refuse_other_scale("FLUX.1", VAE_SCALE),
    ),
    "text_encoder": clip_text_network(
        "CLIP-L text encoder",
        projection=False,
        activation="quick_gelu",
        prefixes=("text_encoders.clip_l.transformer.",),
    ),
    "text_encoder_2": t5_network(prefixes=("text_encoders.t5xxl.transformer.",)),
}
"""By the names of diffusers' folders."""

FILE_FACTS = FileFacts(
    networks=NETWORKS,
    architecture=r"flux[-.]?1",
    key_map=lambda shapes: flux_key_map(),
    sizes={(19, 3072): "dev, schnell or Kontext"},
)
