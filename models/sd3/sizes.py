"""Sizes of SD3's transformer and VAE, read from the tensors' shapes.

A ``config.json`` beside the weights says what the tensors do not.  Each function takes (tensors by diffusers name, config.json or
None) and raises KeyError, with the tensor's name, for files that are not whole.
"""

import math

from models.common.kl_vae import kl_vae_sizes
from models.common.networks import Config, Names
from utils.errors import UserError, listed

HEAD_DIM = 64
"""Width of an attention head in every release: 1536 / 24, 2432 / 38."""
LATENT_SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
"""What the release's inference code does with latents; its files do not tell."""


def block_numbers(names: Names) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in names if name.startswith("transformer_blocks.")})


def transformer_config(names: Names, given: Config | None) -> Config:
    """The arguments of diffusers' SD3Transformer2DModel.  UserError if ``config.json`` says something else than the tensors."""
    width, channels, patch, _ = names["pos_embed.proj.weight"].shape
    query_norm = names.get("transformer_blocks.0.attn.norm_q.weight")
    head_dim = query_norm.shape[0] if query_norm else (given or {}).get("attention_head_dim", HEAD_DIM)
    if width % head_dim:
        raise UserError(
            f"its width {width} is not a multiple of {head_dim}, the width of a head in the released model; "
            "put the model's config.json beside the file, it tells the width of a head"
        )
    caption_width, joint_width = names["context_embedder.weight"].shape
    blocks = block_numbers(names)
    config = {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": names["proj_out.weight"].shape[0] // patch**2,
        "num_layers": len(blocks),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": joint_width,
        "caption_projection_dim": caption_width,
        "pooled_projection_dim": names["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(names["pos_embed.pos_embed"].shape[1]),
        "dual_attention_layers": tuple(number for number in blocks if f"transformer_blocks.{number}.attn2.to_q.weight" in names),
        "qk_norm": "rms_norm" if query_norm else None,
    }
    different = [
        f"{name}: {value} in config.json, {config[name]} by the weights"
        for name, value in (given or {}).items()
        if name in config and value != (list(config[name]) if isinstance(config[name], tuple) else config[name])
    ]
    if different:
        raise UserError(listed(different, "config.json is of another model:"))
    return config


def variant_of(config: Config) -> str:
    """The variant, by the transformer's config."""
    if config["dual_attention_layers"]:
        return "sd35-medium"
    return "sd35-large" if config["qk_norm"] else "sd3-medium"


def vae_config(names: Names, given: Config | None) -> Config:
    """The arguments of diffusers' AutoencoderKL."""
    return {**LATENT_SCALE, **kl_vae_sizes(names, given)}
