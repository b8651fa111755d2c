"""The arguments of FLUX.2's networks, read from the tensors wherever they can be.

So a single file is enough for a released model; a ``config.json`` beside the weights says what the tensors do not.  Each function
takes (tensors by diffusers name, config.json or None) and raises KeyError, with the tensor's name, for files that are not whole.
"""

from models.common.kl_vae import kl_vae_sizes
from models.common.networks import Config, Names
from utils.errors import UserError, listed

ROPE_THETA = 2000
HIDDEN_STATES = {"mistral": (10, 20, 30), "qwen3": (9, 18, 27)}
"""The states of the language model that are the text, by its kind; only the layers up to the last of them are read."""
RELEASED_DECODERS = {
    "mistral": {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 1e6},
}
"""What no tensor tells of Mistral Small 3.2 (24B) and of Qwen3 (4B and 8B)."""
SAVED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type", "max_window_layers")
"""Keys of a transformers config that say how and by what it was saved, or are of no use here."""


def transformer_config(names: Names, given: Config | None) -> Config:
    width, channels = names["x_embedder.weight"].shape
    head_dim = names["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    given = given or {}
    config = {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": names["proj_out.weight"].shape[0],
        "num_layers": _count(names, "transformer_blocks."),
        "num_single_layers": _count(names, "single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": names["context_embedder.weight"].shape[1],
        "timestep_guidance_channels": names["time_guidance_embed.timestep_embedder.linear_1.weight"].shape[1],
        "mlp_ratio": names["transformer_blocks.0.ff.linear_out.weight"].shape[1] / width,
        "axes_dims_rope": tuple(given.get("axes_dims_rope") or (head_dim // 4,) * 4),
        "rope_theta": given.get("rope_theta", ROPE_THETA),
        "eps": given.get("eps", 1e-6),
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in names,
    }
    different = [
        f"{name}: {value} in config.json, {config[name]} by the weights"
        for name, value in given.items()
        if value is not None and name in config and config[name] != (tuple(value) if isinstance(value, list) else value)
    ]
    if different:
        raise UserError(listed(different, "config.json is of another model:"))
    return config


def vae_config(names: Names, given: Config | None) -> Config:
    """Some releases have a decoder of other widths than the encoder."""
    sizes = kl_vae_sizes(names, given)
    widths = [
        names[f"decoder.up_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(len(sizes["block_out_channels"]))
    ]
    return {**sizes, "decoder_block_out_channels": tuple(reversed(widths))}


def text_encoder_config(names: Names, given: Config | None) -> Config:
    """Arguments of MistralConfig or Qwen3Config, and ``kind``: which of them.  Layers after the last that is read do not count."""
    kind = decoder_kind(names)
    given = (given or {}).get("text_config") or given or {}
    told = {name: value for name, value in given.items() if name not in SAVED} or RELEASED_DECODERS[kind]
    vocabulary, width = names["embed_tokens.weight"].shape
    layers = HIDDEN_STATES[kind][-1]
    last = f"layers.{layers - 1}.self_attn."
    head_dim = names[f"{last}q_norm.weight"].shape[0] if kind == "qwen3" else told["head_dim"]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": names[f"layers.{layers - 1}.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "num_attention_heads": names[f"{last}q_proj.weight"].shape[0] // head_dim,
        "num_key_value_heads": names[f"{last}k_proj.weight"].shape[0] // head_dim,
    }
    if "layer_types" in told:
        told = {**told, "layer_types": told["layer_types"][:layers]}
    return {"kind": kind, **told, **sizes}


def decoder_kind(names: Names) -> str:
    """``qwen3`` or ``mistral``: only the former norms its queries and keys."""
    return "qwen3" if "layers.0.self_attn.q_norm.weight" in names else "mistral"


def text_width(config: Config) -> int:
    """Width of the text that the transformer reads: some hidden states side by side."""
    return config["hidden_size"] * len(HIDDEN_STATES[config["kind"]])


def _count(names: Names, prefix: str) -> int:
    """Number of blocks ``<prefix>0.``, ``<prefix>1.``, …"""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
