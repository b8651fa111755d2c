"""Wan's names: diffusers' WanTransformer3DModel and the release's WanModel (t2v, i2v, flf2v, the 2.2 models)."""

from utils.weights.keymap import KeyMap, Rename, Rule

ATTENTION = {
    "to_q.{p}": "q.{p}",
    "to_k.{p}": "k.{p}",
    "to_v.{p}": "v.{p}",
    "to_out.0.{p}": "o.{p}",
    "norm_q.weight": "norm_q.weight",
    "norm_k.weight": "norm_k.weight",
}
IMAGE_ATTENTION = {
    "add_k_proj.{p}": "k_img.{p}",
    "add_v_proj.{p}": "v_img.{p}",
    "norm_added_k.weight": "norm_k_img.weight",
}
BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in {**ATTENTION, **IMAGE_ATTENTION}.items()},
    # Only the norm before cross-attention has weights.  Diffusers counts the norms in the order of use, the release does not.
    "norm2.{p}": "norm3.{p}",
    "ffn.net.0.proj.{p}": "ffn.0.{p}",
    "ffn.net.2.{p}": "ffn.2.{p}",
    "scale_shift_table": "modulation",
}
MODEL = {
    "patch_embedding.{p}": "patch_embedding.{p}",
    "condition_embedder.time_embedder.linear_1.{p}": "time_embedding.0.{p}",
    "condition_embedder.time_embedder.linear_2.{p}": "time_embedding.2.{p}",
    "condition_embedder.time_proj.{p}": "time_projection.1.{p}",
    "condition_embedder.text_embedder.linear_1.{p}": "text_embedding.0.{p}",
    "condition_embedder.text_embedder.linear_2.{p}": "text_embedding.2.{p}",
    "condition_embedder.image_embedder.norm1.{p}": "img_emb.proj.0.{p}",
    "condition_embedder.image_embedder.ff.net.0.proj.{p}": "img_emb.proj.1.{p}",
    "condition_embedder.image_embedder.ff.net.2.{p}": "img_emb.proj.3.{p}",
    "condition_embedder.image_embedder.norm2.{p}": "img_emb.proj.4.{p}",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",  # flf2v only
    "scale_shift_table": "head.modulation",
    "proj_out.{p}": "head.head.{p}",
}


def wan_key_map() -> KeyMap:
    """One table for all variants: which of the names a model has is said by its modules."""
    rules: list[Rule] = [Rename(ours, theirs) for ours, theirs in MODEL.items()]
    rules += [Rename(f"blocks.{{i}}.{ours}", f"blocks.{{i}}.{theirs}") for ours, theirs in BLOCK.items()]
    return KeyMap(
        rules,
        prefixes=("model.diffusion_model.",),  # ComfyUI's checkpoints; its model-only files may have it or not
        ignored=("blocks.{i}.attn2.norm_added_q.weight",),  # in early diffusers conversions, never used
    )
