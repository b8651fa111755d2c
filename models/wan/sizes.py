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
    if given:
        return {name: value for name, value in given.items() if not name.startswith("_")}
    return {"base_dim": _rows(names, "encoder.conv_in.weight"), "z_dim": _rows(names, "post_quant_conv.weight")}


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
