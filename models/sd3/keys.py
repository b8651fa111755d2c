"""SD3's names: diffusers' SD3Transformer2DModel and the release's MMDiTX (``mmditx.py`` of github.com/Stability-AI/sd3.5)."""

from functools import partial

import torch
from torch import Tensor

from utils.weights.keymap import Fuse, KeyMap, Rename, Rule, Transform

OURS, THEIRS = "transformer_blocks.{i}.", "joint_blocks.{i}."

BLOCK = {
    "norm1.linear.{p}": "x_block.adaLN_modulation.1.{p}",
    "norm1_context.linear.{p}": "context_block.adaLN_modulation.1.{p}",
    "attn.to_out.0.{p}": "x_block.attn.proj.{p}",
    "attn.to_add_out.{p}": "context_block.attn.proj.{p}",
    "attn.norm_q.weight": "x_block.attn.ln_q.weight",
    "attn.norm_k.weight": "x_block.attn.ln_k.weight",
    "attn.norm_added_q.weight": "context_block.attn.ln_q.weight",
    "attn.norm_added_k.weight": "context_block.attn.ln_k.weight",
    "attn2.to_out.0.{p}": "x_block.attn2.proj.{p}",
    "attn2.norm_q.weight": "x_block.attn2.ln_q.weight",
    "attn2.norm_k.weight": "x_block.attn2.ln_k.weight",
    "ff.net.0.proj.{p}": "x_block.mlp.fc1.{p}",
    "ff.net.2.{p}": "x_block.mlp.fc2.{p}",
    "ff_context.net.0.proj.{p}": "context_block.mlp.fc1.{p}",
    "ff_context.net.2.{p}": "context_block.mlp.fc2.{p}",
}
FUSED = {
    "x_block.attn.qkv.{p}": ("attn.to_q.{p}", "attn.to_k.{p}", "attn.to_v.{p}"),
    "context_block.attn.qkv.{p}": ("attn.add_q_proj.{p}", "attn.add_k_proj.{p}", "attn.add_v_proj.{p}"),
    "x_block.attn2.qkv.{p}": ("attn2.to_q.{p}", "attn2.to_k.{p}", "attn2.to_v.{p}"),
}
MODEL = {
    "pos_embed.pos_embed": "pos_embed",  # not trained, but files hold it
    "pos_embed.proj.{p}": "x_embedder.proj.{p}",
    "context_embedder.{p}": "context_embedder.{p}",
    "time_text_embed.timestep_embedder.linear_1.{p}": "t_embedder.mlp.0.{p}",
    "time_text_embed.timestep_embedder.linear_2.{p}": "t_embedder.mlp.2.{p}",
    "time_text_embed.text_embedder.linear_1.{p}": "y_embedder.mlp.0.{p}",
    "time_text_embed.text_embedder.linear_2.{p}": "y_embedder.mlp.2.{p}",
    "proj_out.{p}": "final_layer.linear.{p}",
}


def _halves_swapped(tensor: Tensor) -> Tensor:
    """Its own inverse.  The release's rows are first the shift's, then the scale's; diffusers' the other way round."""
    return torch.cat(tensor.chunk(2)[::-1])


_Swapped = partial(Transform, forward=_halves_swapped, inverse=_halves_swapped)


def sd3_key_map(blocks: int) -> KeyMap:
    """The table of a model with so many blocks.

    The number matters: the last block's text norm is another one (``AdaLayerNormContinuous``), and diffusers holds the rows of that
    one, as those of ``norm_out``, in the other order.
    """
    last = blocks - 1
    rules: list[Rule] = [
        _Swapped(
            f"transformer_blocks.{last}.norm1_context.linear.{{p}}", f"joint_blocks.{last}.context_block.adaLN_modulation.1.{{p}}"
        ),
        _Swapped("norm_out.linear.{p}", "final_layer.adaLN_modulation.1.{p}"),
    ]
    rules += [Rename(ours, theirs) for ours, theirs in MODEL.items()]
    rules += [Rename(OURS + ours, THEIRS + theirs) for ours, theirs in BLOCK.items()]
    rules += [Fuse(THEIRS + theirs, tuple(OURS + part for part in parts)) for theirs, parts in FUSED.items()]
    return KeyMap(rules, prefixes=("model.diffusion_model.",))  # of checkpoints; files of the model alone may have it or not
