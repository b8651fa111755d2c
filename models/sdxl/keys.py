"""SDXL's names: diffusers' UNet2DConditionModel and the release's UNetModel, and text encoder 2 as OpenCLIP has it.

The release's names are those of ``sgm/modules/diffusionmodules/openaimodel.py`` (Stability-AI/generative-models) and of
``open_clip/transformer.py``.  The release counts the blocks of the UNet on, diffusers counts those of each level anew.
"""

from models.common.clip import TEXT_MODEL, UNUSED
from utils.weights.keymap import Fuse, KeyMap, Rename, Rule, Transform

LEVELS = 3
BLOCKS_DOWN, BLOCKS_UP = 2, 3
"""Residual blocks of a level on the way down and on the way up; on the way down a downsampler counts as one more."""

UNET = {
    "time_embedding.linear_1.{p}": "time_embed.0.{p}",
    "time_embedding.linear_2.{p}": "time_embed.2.{p}",
    "add_embedding.linear_1.{p}": "label_emb.0.0.{p}",
    "add_embedding.linear_2.{p}": "label_emb.0.2.{p}",
    "conv_in.{p}": "input_blocks.0.0.{p}",
    "conv_norm_out.{p}": "out.0.{p}",
    "conv_out.{p}": "out.2.{p}",
}
RESNET = {
    "norm1.{p}": "in_layers.0.{p}",
    "conv1.{p}": "in_layers.2.{p}",
    "time_emb_proj.{p}": "emb_layers.1.{p}",
    "norm2.{p}": "out_layers.0.{p}",
    "conv2.{p}": "out_layers.3.{p}",
    "conv_shortcut.{p}": "skip_connection.{p}",
}
ATTENTION = {
    name: name
    for name in (
        "norm.{p}",
        "proj_in.{p}",
        "proj_out.{p}",
        "transformer_blocks.{i}.norm{n}.{p}",
        "transformer_blocks.{i}.attn{n}.to_q.weight",
        "transformer_blocks.{i}.attn{n}.to_k.weight",
        "transformer_blocks.{i}.attn{n}.to_v.weight",
        "transformer_blocks.{i}.attn{n}.to_out.0.{p}",
        "transformer_blocks.{i}.ff.net.0.proj.{p}",
        "transformer_blocks.{i}.ff.net.2.{p}",
    )
}

OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.{p}": "ln_final.{p}",
}
OPEN_CLIP_LAYER = {
    "layer_norm1.{p}": "ln_1.{p}",
    "layer_norm2.{p}": "ln_2.{p}",
    "self_attn.out_proj.{p}": "attn.out_proj.{p}",
    "mlp.fc1.{p}": "mlp.c_fc.{p}",
    "mlp.fc2.{p}": "mlp.c_proj.{p}",
}

UNET_PREFIX = "model.diffusion_model."
TEXT_ENCODER_PREFIXES = {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."}
"""Where the UNet and the text encoders are in a checkpoint of the whole model."""
MARKERS = ("v_pred", "ztsnr")
"""Empty tensors that tell ComfyUI of velocity prediction and of zero terminal SNR; beside the weights, without a prefix."""
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""The same for models that were trained with EDM's schedule (Playground 2.5, CosXL)."""


def _renames(table: dict[str, str], ours: str = "", theirs: str = "") -> list[Rule]:
    return [Rename(ours + name, theirs + released) for name, released in table.items()]


def unet_key_map() -> KeyMap:
    """diffusers' UNet2DConditionModel and the release's UNetModel."""
    return KeyMap(_unet_rules(), prefixes=(UNET_PREFIX,), ignored=(*MARKERS, *EDM_MARKERS))


def open_clip_key_map(prefix: str) -> KeyMap:
    """transformers' CLIPTextModelWithProjection and OpenCLIP's text tower.  ``prefix``: where it is inside a checkpoint."""
    return KeyMap(_open_clip_rules(), prefixes=(prefix,), ignored=UNUSED)


def model_key_map(prefix: str = "") -> KeyMap:
    """The UNet and both text encoders, by the names that they have when they are trained, and the release's checkpoint.

    ``prefix``: what stands before the UNet's names there, :data:`UNET_PREFIX`; without it they are those of LoRA files.
    """
    clip_l, clip_g = TEXT_ENCODER_PREFIXES["text_encoder"], TEXT_ENCODER_PREFIXES["text_encoder_2"]
    rules = _unet_rules(prefix)
    rules += [Rename(f"text_encoder.text_model.{name}", f"{clip_l}text_model.{name}") for name in TEXT_MODEL]
    rules += _open_clip_rules("text_encoder_2.", clip_g)
    return KeyMap(rules, prefixes=() if prefix else (UNET_PREFIX,), ignored=(*MARKERS, *EDM_MARKERS))


def _unet_rules(prefix: str = "") -> list[Rule]:
    rules = _renames(UNET, "", prefix)
    rules += _renames(RESNET, "mid_block.resnets.0.", f"{prefix}middle_block.0.")
    rules += _renames(ATTENTION, "mid_block.attentions.0.", f"{prefix}middle_block.1.")
    rules += _renames(RESNET, "mid_block.resnets.1.", f"{prefix}middle_block.2.")
    for level in range(LEVELS):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        for index in range(BLOCKS_DOWN):
            theirs = f"{prefix}input_blocks.{1 + level * (BLOCKS_DOWN + 1) + index}."
            rules += _renames(RESNET, f"{down}resnets.{index}.", f"{theirs}0.")
            rules += _renames(ATTENTION, f"{down}attentions.{index}.", f"{theirs}1.") if level > 0 else []
        for index in range(BLOCKS_UP):
            theirs = f"{prefix}output_blocks.{level * BLOCKS_UP + index}."
            rules += _renames(RESNET, f"{up}resnets.{index}.", f"{theirs}0.")
            rules += _renames(ATTENTION, f"{up}attentions.{index}.", f"{theirs}1.") if level < LEVELS - 1 else []
        if level < LEVELS - 1:  # a sampler of its own after the first two levels; on the way up it follows an attention
            last_down, last_up = (level + 1) * (BLOCKS_DOWN + 1), level * BLOCKS_UP + BLOCKS_UP - 1
            rules.append(Rename(f"{down}downsamplers.0.conv.{{p}}", f"{prefix}input_blocks.{last_down}.0.op.{{p}}"))
            rules.append(Rename(f"{up}upsamplers.0.conv.{{p}}", f"{prefix}output_blocks.{last_up}.2.conv.{{p}}"))
    return rules


def _open_clip_rules(ours: str = "", theirs: str = "") -> list[Rule]:
    layer, block = f"{ours}text_model.encoder.layers.{{i}}.", f"{theirs}transformer.resblocks.{{i}}."
    rules = [
        *_renames(OPEN_CLIP, ours, theirs),
        *_renames(OPEN_CLIP_LAYER, layer, block),
        # OpenCLIP multiplies from the left.
        Transform(
            f"{ours}text_projection.weight",
            f"{theirs}text_projection",
            lambda tensor: tensor.T.contiguous(),
            lambda tensor: tensor.T.contiguous(),
        ),
    ]
    for kind in ("weight", "bias"):
        rules.append(Fuse(f"{block}attn.in_proj_{kind}", tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")))
    return rules
