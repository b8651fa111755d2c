"""FLUX.2's names: diffusers' Flux2Transformer2DModel and the release's ``Flux2`` (black-forest-labs/flux2, ``model.py``)."""

import torch
from torch import Tensor

from utils.weights.keymap import Fuse, KeyMap, Rename, Rule, Transform

MODEL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",  # not in Klein
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
DOUBLE_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE_BLOCK = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
SINGLE_NORMS = {
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
OURS = ("transformer_blocks.{i}.", "single_transformer_blocks.{i}.")
THEIRS = ("double_blocks.{i}.", "single_blocks.{i}.")


def swap_halves(tensor: Tensor) -> Tensor:
    """Diffusers' final modulation is (scale, shift), the release's (shift, scale).  Its own inverse."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def flux2_key_map() -> KeyMap:
    """One table for all variants: which of the names a model has is said by its modules.  FLUX.2 has no biases."""
    rules: list[Rule] = [Rename(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in MODEL.items()]
    rules.append(Transform("norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", swap_halves, swap_halves))
    for ours, theirs, modules, norms in zip(OURS, THEIRS, (DOUBLE_BLOCK, SINGLE_BLOCK), (DOUBLE_NORMS, SINGLE_NORMS), strict=True):
        rules += [Rename(f"{ours}{name}.weight", f"{theirs}{released}.weight") for name, released in modules.items()]
        rules += [Rename(f"{ours}{name}.weight", f"{theirs}{released}.scale") for name, released in norms.items()]
    rules += [
        Fuse(f"{THEIRS[0]}{released}.weight", tuple(f"{OURS[0]}{name}.weight" for name in names))
        for released, names in DOUBLE_FUSED.items()
    ]
    return KeyMap(rules, prefixes=("model.diffusion_model.",))  # ComfyUI's checkpoints; its model-only files may have it or not
