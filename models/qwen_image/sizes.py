"""Configs of Qwen-Image's networks, read from the shapes of their tensors; what no tensor tells is in ``config.json``.

Without a config the constants of the releases hold.  Each function takes (tensors by diffusers name, config.json or None) and
raises KeyError, with the tensor's name, for files that are not whole.
"""

from models.common.networks import Config, Names
from models.common.tokens import SIDE
from models.qwen_image.keys import LAYERED
from utils.errors import UserError, listed

ROPE_AXES = (16, 56, 56)
"""Shares of a transformer head's width that the frame, the row and the column of a token rotate."""
TEXT_HEAD_DIM, VISION_HEAD_DIM = 128, 80
"""Widths of heads in Qwen2.5-VL-7B: 3584 / 28 and 1280 / 16."""
TEXT_CONSTANTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
VISION_CONSTANTS = {
    "spatial_merge_size": 2,
    "window_size": 112,
    "tokens_per_second": 2,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def transformer_config(names: Names, given: Config | None) -> Config:
    """``zero_cond_t`` is what the config says; ComfyUI's files say it otherwise (see ``files.py``)."""
    given = given or {}
    width, channels = names["img_in.weight"].shape
    head = names["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    axes = tuple(given.get("axes_dims_rope", ROPE_AXES))
    if sum(axes) != head:
        raise UserError(
            f"its heads are {head} wide, and the position embedding's axes {axes} are for {sum(axes)}; "
            "put the model's config.json beside the file, it tells the axes"
        )
    told = {
        "patch_size": SIDE,
        "in_channels": channels,
        "out_channels": names["proj_out.weight"].shape[0] // SIDE**2,
        "num_layers": _count(names, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": names["txt_in.weight"].shape[1],
    }
    if different := [
        f"{key}: {given[key]} in config.json, {told[key]} by the weights" for key in told if given.get(key, told[key]) != told[key]
    ]:
        raise UserError(listed(different, "config.json is of another model:"))
    if LAYERED in names:
        raise UserError("this is Qwen-Image-Layered, which is not supported; supported are Qwen-Image and Qwen-Image-Edit")
    return {**told, "axes_dims_rope": axes, "zero_cond_t": bool(given.get("zero_cond_t", False))}


def vae_config(names: Names, given: Config | None) -> Config:
    if given:
        return {name: value for name, value in given.items() if not name.startswith("_")}
    return {"base_dim": names["encoder.conv_in.weight"].shape[0], "z_dim": names["post_quant_conv.weight"].shape[0]}


def text_encoder_config(names: Names, given: Config | None) -> Config:
    """Arguments of transformers' ``Qwen2_5_VLConfig``."""
    given = given or {}
    # Configs of the releases have the language model's settings at the top, today's in a table of their own.
    text, vision = given.get("text_config", given), given.get("vision_config", {})
    vocabulary, width = names["model.language_model.embed_tokens.weight"].shape
    layer, block = "model.language_model.layers.0", "model.visual.blocks.0"
    queries, keys = (names[f"{layer}.self_attn.{part}_proj.weight"].shape[0] for part in "qk")
    heads = text.get("num_attention_heads", queries // TEXT_HEAD_DIM)
    vision_width, channels, frames, patch, _ = names["model.visual.patch_embed.proj.weight"].shape
    constants = TEXT_CONSTANTS["rope_parameters"]
    rope = text.get("rope_parameters") or {
        **constants,
        "rope_theta": text.get("rope_theta", constants["rope_theta"]),
        "mrope_section": (text.get("rope_scaling") or constants)["mrope_section"],
    }
    return {
        "text_config": {
            **_known(TEXT_CONSTANTS, text),
            "rope_parameters": rope,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": names[f"{layer}.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": _count(names, "model.language_model.layers."),
            "num_attention_heads": heads,
            "num_key_value_heads": keys * heads // queries,
            "bos_token_id": None,  # for generating text, and of another vocabulary in small models
            "eos_token_id": None,
        },
        "vision_config": {
            **_known(VISION_CONSTANTS, vision),
            "depth": _count(names, "model.visual.blocks."),
            "hidden_size": vision_width,
            "in_channels": channels,
            "temporal_patch_size": frames,
            "patch_size": patch,
            "intermediate_size": names[f"{block}.mlp.gate_proj.weight"].shape[0],
            "num_heads": vision.get("num_heads", vision_width // VISION_HEAD_DIM),
            "out_hidden_size": names["model.visual.merger.mlp.2.weight"].shape[0],
        },
        **_known(TOKEN_IDS, given),
    }


def _known(constants: Config, given: Config) -> Config:
    return {key: given.get(key, value) for key, value in constants.items()}


def _count(names: Names, prefix: str) -> int:
    """Number of blocks ``<prefix>0.``, ``<prefix>1.``, …"""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
