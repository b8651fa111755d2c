"""Names of Wan's frozen networks: those of diffusers and transformers, and those of the release's `.pth` files.

The release's names were read in Wan2.1's ``wan/modules/t5.py``, ``clip.py`` and ``vae.py``.  ComfyUI's files of the text and image
encoders have transformers' names already, its VAE file has the release's.
"""

from utils.checkpoints.keymap import Fuse, KeyMap, Rename, Rule, Transform

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

VAE = {
    "quant_conv.{p}": "conv1.{p}",
    "post_quant_conv.{p}": "conv2.{p}",
}
VAE_CODER = {
    "conv_in.{p}": "conv1.{p}",
    "mid_block.attentions.0.norm.gamma": "middle.1.norm.gamma",
    "mid_block.attentions.0.to_qkv.{p}": "middle.1.to_qkv.{p}",
    "mid_block.attentions.0.proj.{p}": "middle.1.proj.{p}",
    "norm_out.gamma": "head.0.gamma",
    "conv_out.{p}": "head.2.{p}",
}
VAE_RESNET = {
    "norm1.gamma": "residual.0.gamma",
    "conv1.{p}": "residual.2.{p}",
    "norm2.gamma": "residual.3.gamma",
    "conv2.{p}": "residual.6.{p}",
    "conv_shortcut.{p}": "shortcut.{p}",
}
VAE_RESAMPLER = {
    "resample.1.{p}": "resample.1.{p}",
    "time_conv.{p}": "time_conv.{p}",
}
VAE_LEVELS = 4
VAE_RESNETS_UP = 3
"""Residual blocks of each level of the decoder; the release counts them and the resamplers on, diffusers counts each level anew."""


def _renames(table: dict[str, str], ours: str = "", theirs: str = "") -> list[Rule]:
    return [Rename(ours + name, theirs + released) for name, released in table.items()]


def t5_key_map() -> KeyMap:
    """transformers' UMT5EncoderModel and the release's T5Encoder (``models_t5_umt5-xxl-enc-bf16.pth``)."""
    return KeyMap(
        [*_renames(T5), *_renames(T5_BLOCK, "encoder.block.{i}.", "blocks.{i}.")],
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


def vae_key_map() -> KeyMap:
    """diffusers' AutoencoderKLWan and the release's WanVAE (``Wan2.1_VAE.pth``, ``wan_2.1_vae.safetensors``)."""
    rules = _renames(VAE)
    for coder in ("encoder.", "decoder."):
        rules += _renames(VAE_CODER, coder, coder)
        for ours, theirs in ((0, 0), (1, 2)):
            rules += _renames(VAE_RESNET, f"{coder}mid_block.resnets.{ours}.", f"{coder}middle.{theirs}.")
    rules += _renames({**VAE_RESNET, **VAE_RESAMPLER}, "encoder.down_blocks.{i}.", "encoder.downsamples.{i}.")
    for level in range(VAE_LEVELS):
        first = level * (VAE_RESNETS_UP + 1)
        for index in range(VAE_RESNETS_UP):
            rules += _renames(VAE_RESNET, f"decoder.up_blocks.{level}.resnets.{index}.", f"decoder.upsamples.{first + index}.")
        resampler = f"decoder.upsamples.{first + VAE_RESNETS_UP}."
        rules += _renames(VAE_RESAMPLER, f"decoder.up_blocks.{level}.upsamplers.0.", resampler)
    return KeyMap(rules)
