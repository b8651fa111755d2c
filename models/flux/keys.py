"""FLUX.1's names: diffusers' FluxTransformer2DModel and BFL's Flux."""

import torch
from torch import Tensor

from utils.weights.keymap import Fuse, KeyMap, Rename, Rule, Transform

EMBEDDERS = {
    "x_embedder.{p}": "img_in.{p}",
    "context_embedder.{p}": "txt_in.{p}",
    "proj_out.{p}": "final_layer.linear.{p}",
}
TIME_TEXT = {"timestep": "time", "text": "vector", "guidance": "guidance"}
LINEARS = {"linear_1": "in_layer", "linear_2": "out_layer"}
DOUBLE = {
    "norm1.linear.{p}": "img_mod.lin.{p}",
    "norm1_context.linear.{p}": "txt_mod.lin.{p}",
    "attn.to_out.0.{p}": "img_attn.proj.{p}",
    "attn.to_add_out.{p}": "txt_attn.proj.{p}",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj.{p}": "img_mlp.0.{p}",
    "ff.net.2.{p}": "img_mlp.2.{p}",
    "ff_context.net.0.proj.{p}": "txt_mlp.0.{p}",
    "ff_context.net.2.{p}": "txt_mlp.2.{p}",
}
SINGLE = {
    "norm.linear.{p}": "modulation.lin.{p}",
    "proj_out.{p}": "linear2.{p}",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
MLP_RATIO = 4


def _halves_swapped(rows: Tensor) -> Tensor:
    """diffusers' final modulation is (scale, shift), the release's (shift, scale).  Its own inverse."""
    return torch.cat(rows.chunk(2)[::-1])


def flux_key_map() -> KeyMap:
    """One table for all variants: schnell has no guidance embedder, Kontext has dev's names."""
    double, single = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."
    rules: list[Rule] = [Rename(ours, theirs) for ours, theirs in EMBEDDERS.items()]
    rules += [
        Rename(f"time_text_embed.{ours}_embedder.{linear}.{{p}}", f"{theirs}_in.{layer}.{{p}}")
        for ours, theirs in TIME_TEXT.items()
        for linear, layer in LINEARS.items()
    ]
    rules.append(Transform("norm_out.linear.{p}", "final_layer.adaLN_modulation.1.{p}", _halves_swapped, _halves_swapped))
    rules += [Rename(double + ours, f"double_blocks.{{i}}.{theirs}") for ours, theirs in DOUBLE.items()]
    rules += [Rename(single + ours, f"single_blocks.{{i}}.{theirs}") for ours, theirs in SINGLE.items()]
    for theirs, ours in {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}.items():
        rules.append(Fuse(f"double_blocks.{{i}}.{theirs}.qkv.{{p}}", tuple(f"{double}attn.{name}.{{p}}" for name in ours)))
    joined = (*(f"{single}attn.to_{part}.{{p}}" for part in "qkv"), f"{single}proj_mlp.{{p}}")
    rules.append(Fuse("single_blocks.{i}.linear1.{p}", joined, shares=(1, 1, 1, MLP_RATIO)))
    return KeyMap(rules, prefixes=("model.diffusion_model.",))  # ComfyUI's checkpoints
