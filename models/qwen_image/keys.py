"""Names of Qwen-Image's transformer and of its text encoder, Qwen2.5-VL.

The transformer is released under diffusers' names; ComfyUI's files have the same, with or without a prefix.  Files of the text
encoder have the names of transformers before 4.52, as the release and ComfyUI's ``qwen_2.5_vl_7b.safetensors``, or today's.
"""

from utils.weights.keymap import KeyMap, Rename, Rule

EDIT_2511_MARK = "__index_timestep_zero__"
"""An empty tensor by which ComfyUI knows Edit-2511; diffusers says it in the config (``zero_cond_t``)."""
LAYERED = "time_text_embed.addition_t_embedding.weight"
"""Only Qwen-Image-Layered has this."""

MODEL = (
    "img_in.{p}",
    "txt_norm.weight",
    "txt_in.{p}",
    "time_text_embed.timestep_embedder.linear_1.{p}",
    "time_text_embed.timestep_embedder.linear_2.{p}",
    LAYERED,
    "norm_out.linear.{p}",
    "proj_out.{p}",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
BLOCK = (
    "img_mod.1.{p}",
    "txt_mod.1.{p}",
    *(f"attn.{name}.{{p}}" for name in ATTENTION),
    *(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),
    *(f"{stream}_mlp.net.{part}.{{p}}" for stream in ("img", "txt") for part in ("0.proj", "2")),
)

LANGUAGE = (
    "embed_tokens.weight",
    "norm.weight",
    "layers.{i}.input_layernorm.weight",
    "layers.{i}.post_attention_layernorm.weight",
    *(f"layers.{{i}}.self_attn.{part}_proj.{{p}}" for part in "qkvo"),
    *(f"layers.{{i}}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
)
VISION = (
    "patch_embed.proj.weight",
    "blocks.{i}.norm1.weight",
    "blocks.{i}.norm2.weight",
    "blocks.{i}.attn.qkv.{p}",
    "blocks.{i}.attn.proj.{p}",
    *(f"blocks.{{i}}.mlp.{part}_proj.{{p}}" for part in ("gate", "up", "down")),
    "merger.ln_q.weight",
    "merger.mlp.0.{p}",
    "merger.mlp.2.{p}",
)


def qwen_key_map() -> KeyMap:
    """One table for all variants; the prefix is that of ComfyUI's checkpoints, which its model-only files may have or not."""
    names = [*MODEL, *(f"transformer_blocks.{{i}}.{name}" for name in BLOCK)]
    return KeyMap([Rename(name, name) for name in names], prefixes=("model.diffusion_model.",), ignored=(EDIT_2511_MARK,))


def text_key_map() -> KeyMap:
    """Modules of ``Qwen2_5_VLForConditionalGeneration`` without its head, which makes tokens and is not used."""
    rules: list[Rule] = [Rename(f"model.language_model.{name}", f"model.{name}") for name in LANGUAGE]
    rules += [Rename(f"model.visual.{name}", f"visual.{name}") for name in VISION]
    return KeyMap(rules, prefixes=("text_encoders.qwen25_7b.transformer.",), ignored=("lm_head.weight",))
