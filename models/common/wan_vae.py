"""The causal VAE that Wan 2.1 and Qwen-Image share, tensor for tensor: names of its releases.

The release's names were read in Wan2.1's ``wan/modules/vae.py``; ComfyUI's files (``wan_2.1_vae.safetensors``,
``qwen_image_vae.safetensors``) have them too.  The other names are diffusers' (``AutoencoderKLWan``, ``AutoencoderKLQwenImage``).
"""

from utils.weights.keymap import KeyMap, Rename, Rule

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
PREFIXES = ("first_stage_model.", "vae.")
VAE_LEVELS = 4
VAE_RESNETS_UP = 3
"""Residual blocks of each level of the decoder; the release counts them and the resamplers on, diffusers counts each level anew."""


def _renames(table: dict[str, str], ours: str = "", theirs: str = "") -> list[Rule]:
    return [Rename(ours + name, theirs + released) for name, released in table.items()]


def coder_rules() -> list[Rule]:
    """What is outside of the encoder's and decoder's levels; the VAE of Wan 2.2 has it too."""
    rules = _renames(VAE)
    for coder in ("encoder.", "decoder."):
        rules += _renames(VAE_CODER, coder, coder)
        for ours, theirs in ((0, 0), (1, 2)):
            rules += _renames(VAE_RESNET, f"{coder}mid_block.resnets.{ours}.", f"{coder}middle.{theirs}.")
    return rules


def vae_key_map() -> KeyMap:
    """diffusers' names and the release's; the prefixes are those of all-in-one checkpoints."""
    rules = coder_rules()
    rules += _renames({**VAE_RESNET, **VAE_RESAMPLER}, "encoder.down_blocks.{i}.", "encoder.downsamples.{i}.")
    for level in range(VAE_LEVELS):
        first = level * (VAE_RESNETS_UP + 1)
        for index in range(VAE_RESNETS_UP):
            rules += _renames(VAE_RESNET, f"decoder.up_blocks.{level}.resnets.{index}.", f"decoder.upsamples.{first + index}.")
        resampler = f"decoder.upsamples.{first + VAE_RESNETS_UP}."
        rules += _renames(VAE_RESAMPLER, f"decoder.up_blocks.{level}.upsamplers.0.", resampler)
    return KeyMap(rules, prefixes=PREFIXES)
