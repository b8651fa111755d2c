"""The arguments of Wan's four networks, read from the tensors wherever they can be.

So a single file is enough for a released model; a ``config.json`` beside the weights says what the tensors do not.  Each function
takes (tensors by diffusers name, config.json or None) and raises KeyError, with the tensor's name, for files that are not whole.
"""

import math

from models.common.networks import Config, Names
from utils.errors import UserError, listed

HEAD_DIM = 128
"""Width of an attention head in every released Wan transformer (1536 / 12, 5120 / 40)."""
CLIP_HEAD_DIM = 80
"""The same in CLIP ViT-H/14: 1280 / 16."""
ROPE_POSITIONS = 1024
VAE_22_LATENTS = {
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
        *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
        *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}
"""Mean and deviation of the Wan 2.2 VAE's latents by channel, from ``wan/modules/vae2_2.py``.

Those of 2.1 are the defaults of diffusers' class.
"""
VAE_TOP = 4
"""How many times its base width the decoder is wide where it begins."""

RELEASED_SIZES = {
    "dim": lambda config: config["num_attention_heads"] * config["attention_head_dim"],
    "ffn_dim": lambda config: config["ffn_dim"],
    "freq_dim": lambda config: config["freq_dim"],
    "in_dim": lambda config: config["in_channels"],
    "out_dim": lambda config: config["out_channels"],
    "num_layers": lambda config: config["num_layers"],
}
"""Keys of the release's ``config.json`` that the tensors tell as well."""


def _count(names: Names, prefix: str) -> int:
    """Number of blocks ``<prefix>0.``, ``<prefix>1.``, …"""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def _heads(width: int, head_dim: int) -> int:
    if width % head_dim:
        raise UserError(
            f"its width {width} is not a multiple of {head_dim}, the width of a head in the released model; "
            "put the model's config.json beside the file, it tells the number of heads"
        )
    return width // head_dim


def _rows(names: Names, name: str) -> int:
    return names[name].shape[0]


def _columns(names: Names, name: str) -> int:
    return names[name].shape[1]


def transformer_config(names: Names, given: Config | None) -> Config:
    dim, channels, *patch = names["patch_embedding.weight"].shape
    image_norm, positions = (names.get(f"condition_embedder.image_embedder.{name}") for name in ("norm1.weight", "pos_embed"))
    given = given or {}
    # The release says how many heads there are, diffusers says how wide they are too.
    heads = given.get("num_attention_heads") or given.get("num_heads") or _heads(dim, HEAD_DIM)
    config = {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": _rows(names, "proj_out.weight") // math.prod(patch),
        "text_dim": _columns(names, "condition_embedder.text_embedder.linear_1.weight"),
        "freq_dim": _columns(names, "condition_embedder.time_embedder.linear_1.weight"),
        "ffn_dim": _rows(names, "blocks.0.ffn.net.0.proj.weight"),
        "num_layers": _count(names, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in names,
        "qk_norm": "rms_norm_across_heads",
        "eps": given.get("eps", 1e-6),
        "image_dim": image_norm.shape[0] if image_norm else None,
        "added_kv_proj_dim": _columns(names, "blocks.0.attn2.add_k_proj.weight") if image_norm else None,
        "rope_max_seq_len": given.get("rope_max_seq_len", ROPE_POSITIONS),
        "pos_embed_seq_len": positions.shape[1] if positions else None,
    }
    told = {**{name: read(config) for name, read in RELEASED_SIZES.items()}, **config}
    different = [
        f"{name}: {value} in config.json, {told[name]} by the weights"
        for name, value in given.items()
        if name in told and value != (list(told[name]) if isinstance(told[name], tuple) else told[name])
    ]
    if different:
        raise UserError(listed(different, "config.json is of another model:"))
    return config


def vae_config(names: Names, given: Config | None) -> Config:
    """The 2.2 VAE is known by its blocks, which are nested; it reads and makes patches of pixels."""
    if given:
        return {name: value for name, value in given.items() if not name.startswith("_")}
    base, latents = _rows(names, "encoder.conv_in.weight"), _rows(names, "post_quant_conv.weight")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" not in names:
        return {"base_dim": base, "z_dim": latents}
    pixels = _columns(names, "encoder.conv_in.weight")
    patch = math.isqrt(pixels // 3)
    return {
        "base_dim": base,
        "decoder_base_dim": _rows(names, "decoder.conv_in.weight") // VAE_TOP,
        "z_dim": latents,
        "is_residual": True,
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": patch,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8 * patch,
        **VAE_22_LATENTS,
    }


def t5_config(names: Names, given: Config | None) -> Config:
    vocabulary, width = names["shared.weight"].shape
    block = "encoder.block.0.layer."
    buckets, heads = names[f"{block}0.SelfAttention.relative_attention_bias.weight"].shape
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _rows(names, f"{block}0.SelfAttention.q.weight") // heads,
        "d_ff": _rows(names, f"{block}1.DenseReluDense.wi_0.weight"),
        "num_layers": _count(names, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    return {"tie_word_embeddings": True, **_meaning(given), **sizes}


def clip_config(names: Names, given: Config | None) -> Config:
    width, _, patch, _ = names["embeddings.patch_embedding.weight"].shape
    side = math.isqrt(_rows(names, "embeddings.position_embedding.weight") - 1)
    sizes = {
        "hidden_size": width,
        "intermediate_size": _rows(names, "encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": _count(names, "encoder.layers."),
        "image_size": side * patch,
        "patch_size": patch,
    }
    given = _meaning(given) or {"num_attention_heads": _heads(width, CLIP_HEAD_DIM)}
    return {"hidden_act": "gelu", **given, **sizes}


def _meaning(given: Config | None) -> Config:
    """A transformers config without what says how and by what it was saved."""
    saved = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type")
    return {name: value for name, value in (given or {}).items() if name not in saved}
