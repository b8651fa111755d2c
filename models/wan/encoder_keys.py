"""Names of Wan's frozen networks: those of diffusers and transformers, and those of the release's `.pth` files.

The release's names were read in Wan2.1's ``wan/modules/t5.py``, ``clip.py`` and ``vae.py``, and in Wan2.2's ``vae2_2.py``.
ComfyUI's files of the text and image encoders have transformers' names already, its VAE file has the release's.
"""

from models.common.wan_vae import PREFIXES, VAE_RESAMPLER, VAE_RESNET, VAE_RESNETS_UP, coder_rules, vae_key_map
from utils.weights.keymap import Fuse, KeyMap, Rename, Rule, Transform

__all__ = ["clip_key_map", "t5_key_map", "vae_22_key_map", "vae_key_map"]

T5 = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}
T5_BLOCK = {
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",  # the one that goes through GELU
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
}

CLIP = {
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm.{p}": "pre_norm.{p}",  # transformers spells it so
    "post_layernorm.{p}": "post_norm.{p}",
}
CLIP_BLOCK = {
    "layer_norm1.{p}": "norm1.{p}",
    "layer_norm2.{p}": "norm2.{p}",
    "self_attn.out_proj.{p}": "attn.proj.{p}",
    "mlp.fc1.{p}": "mlp.0.{p}",
    "mlp.fc2.{p}": "mlp.2.{p}",
}
VAE_22_RESNETS_DOWN = 2
"""Residual blocks of each level of the Wan 2.2 VAE's encoder."""


def _renames(table: dict[str, str], ours: str = "", theirs: str = "") -> list[Rule]:
    return [Rename(ours + name, theirs + released) for name, released in table.items()]


def t5_key_map() -> KeyMap:
    """transformers' UMT5EncoderModel and the release's T5Encoder (``models_t5_umt5-xxl-enc-bf16.pth``)."""
    return KeyMap(
        [*_renames(T5), *_renames(T5_BLOCK, "encoder.block.{i}.", "blocks.{i}.")],
        prefixes=("text_encoders.umt5xxl.transformer.",),  # in ComfyUI's all-in-one checkpoints
        # The same tensor as `shared`, and the sentencepiece model of ComfyUI's files.
        ignored=("encoder.embed_tokens.weight", "spiece_model"),
    )


def clip_key_map() -> KeyMap:
    """transformers' CLIPVisionModel and the release's VisionTransformer (``models_clip_open-clip-xlm-roberta-*.pth``).

    Two tensors of the release have one or two more leading dimensions of size 1.
    """
    rules = [
        Transform("embeddings.class_embedding", "cls_embedding", lambda t: t[None, None], lambda t: t[0, 0]),
        Transform("embeddings.position_embedding.weight", "pos_embedding", lambda t: t[None], lambda t: t[0]),
        *_renames(CLIP),
        *_renames(CLIP_BLOCK, "encoder.layers.{i}.", "transformer.{i}."),
        Fuse("transformer.{i}.attn.to_qkv.{p}", tuple(f"encoder.layers.{{i}}.self_attn.{part}_proj.{{p}}" for part in "qkv")),
    ]
    # The projections into the space shared with text, and the buffer that older transformers saved.
    ignored = ("head", "visual_projection.weight", "embeddings.position_ids")
    return KeyMap(rules, prefixes=("visual.", "vision_model."), ignored=ignored)


def vae_22_key_map() -> KeyMap:
    """diffusers' AutoencoderKLWan with ``is_residual`` and the release's WanVAE_ (``Wan2.2_VAE.pth``, ``wan2.2_vae.safetensors``).

    Blocks are nested in levels on both sides.  The release counts the resampler of a level on after its residual blocks.
    """
    rules = coder_rules()
    for ours, theirs, last in (
        ("encoder.down_blocks.{i}.", "encoder.downsamples.{i}.downsamples.", VAE_22_RESNETS_DOWN),
        ("decoder.up_blocks.{i}.", "decoder.upsamples.{i}.upsamples.", VAE_RESNETS_UP),
    ):
        rules += _renames(VAE_RESNET, ours + "resnets.{j}.", theirs + "{j}.")
        resampler = "downsampler." if ours.startswith("encoder.") else "upsampler."
        rules += _renames(VAE_RESAMPLER, ours + resampler, f"{theirs}{last}.")
    return KeyMap(rules, prefixes=PREFIXES)
