"""The convolutional VAE that SDXL, SD3, FLUX.1 and FLUX.2 share: names of its releases, and its sizes read from the tensors.

The release's names are those of ``ldm/modules/diffusionmodules/model.py`` (CompVis latent-diffusion), which ComfyUI has too; the
other names are diffusers' (``AutoencoderKL``, ``AutoencoderKLFlux2``).
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from models.common.networks import Config, Names
from utils.errors import UserError
from utils.weights.keymap import KeyMap, Rename, Rule, Transform

CODER = {
    "conv_in.{p}": "conv_in.{p}",
    "conv_norm_out.{p}": "norm_out.{p}",
    "conv_out.{p}": "conv_out.{p}",
    "mid_block.attentions.0.group_norm.{p}": "mid.attn_1.norm.{p}",
}
RESNET = {
    "norm1.{p}": "norm1.{p}",
    "conv1.{p}": "conv1.{p}",
    "norm2.{p}": "norm2.{p}",
    "conv2.{p}": "conv2.{p}",
    "conv_shortcut.{p}": "nin_shortcut.{p}",
}
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
LEVELS = 4
NORM_GROUPS = 32
"""Of the norms of every release."""


def _as_convolution(weight: Tensor) -> Tensor:
    """[out, in] to [out, in, 1, 1]: the release's attention is made of 1x1 convolutions, diffusers' of linear layers."""
    return weight[:, :, None, None]


def _as_linear(weight: Tensor) -> Tensor:
    """The inverse of :func:`_as_convolution`; a linear weight, as some files hold it, is left as it is."""
    return weight.flatten(1)


def kl_vae_key_map(
    *, quant_in_coders: bool = False, extra: Iterable[Rule] = (), prefixes: Iterable[str] = (), ignored: Iterable[str] = ()
) -> KeyMap:
    """diffusers' names and the release's.

    ``quant_in_coders``: the 1x1 convolutions around the latents belong to encoder and decoder, as in FLUX.2's release, and not to
    the model.  ``prefixes`` come besides those of all-in-one checkpoints; ``extra`` and ``ignored`` as for :class:`KeyMap`.
    """
    owners = ("encoder.", "decoder.") if quant_in_coders else ("", "")
    rules: list[Rule] = [
        Rename(f"{name}.{{p}}", f"{owner}{name}.{{p}}")
        for name, owner in zip(("quant_conv", "post_quant_conv"), owners, strict=True)
    ]
    for coder in ("encoder.", "decoder."):
        rules += [Rename(coder + ours, coder + theirs) for ours, theirs in CODER.items()]
        for ours, theirs in ATTENTION.items():
            ours, theirs = f"{coder}mid_block.attentions.0.{ours}", f"{coder}mid.attn_1.{theirs}"
            rules.append(Transform(f"{ours}.weight", f"{theirs}.weight", _as_convolution, _as_linear))
            rules.append(Rename(f"{ours}.bias", f"{theirs}.bias"))
        for index in (0, 1):
            rules += _resnet(f"{coder}mid_block.resnets.{index}.", f"{coder}mid.block_{index + 1}.")
    rules += _resnet("encoder.down_blocks.{i}.resnets.{j}.", "encoder.down.{i}.block.{j}.")
    rules.append(Rename("encoder.down_blocks.{i}.downsamplers.0.conv.{p}", "encoder.down.{i}.downsample.conv.{p}"))
    for level in range(LEVELS):  # the release counts the decoder's levels by size, diffusers in the order of use
        ours, theirs = f"decoder.up_blocks.{level}.", f"decoder.up.{LEVELS - 1 - level}."
        rules += _resnet(f"{ours}resnets.{{j}}.", f"{theirs}block.{{j}}.")
        rules.append(Rename(f"{ours}upsamplers.0.conv.{{p}}", f"{theirs}upsample.conv.{{p}}"))
    return KeyMap([*rules, *extra], prefixes=("first_stage_model.", "vae.", *prefixes), ignored=ignored)


def _resnet(ours: str, theirs: str) -> list[Rule]:
    return [Rename(ours + name, theirs + released) for name, released in RESNET.items()]


def kl_vae_sizes(names: Names, given: Config | None) -> Config:
    """Arguments of diffusers' class: sizes from the tensors, the rest from ``config.json`` if there is one.

    Without one the groups of the norms are those of every release; what else is not in the tensors (the scale of the latents) is
    left to the caller.  KeyError, with the tensor's name, if one is missing.
    """
    levels = len({name.split(".")[2] for name in names if name.startswith("encoder.down_blocks.")})
    resnets = {name.split(".")[4] for name in names if name.startswith("encoder.down_blocks.0.resnets.")}
    sizes = {
        "in_channels": names["encoder.conv_in.weight"].shape[1],
        "out_channels": names["decoder.conv_out.weight"].shape[0],
        "latent_channels": names["decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(
            names[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)
        ),
        "layers_per_block": len(resnets),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in names,
        "use_quant_conv": "quant_conv.weight" in names,
        "use_post_quant_conv": "post_quant_conv.weight" in names,
    }
    told = {name: value for name, value in (given or {}).items() if not name.startswith("_")}
    groups = told.get("norm_num_groups", NORM_GROUPS)
    if any(width % groups for width in sizes["block_out_channels"]):
        raise UserError(
            f"its widths {list(sizes['block_out_channels'])} are not multiples of {groups}, the number of groups of its norms; "
            "put the VAE's config.json beside the file, it tells the number"
        )
    return {**told, **sizes, "norm_num_groups": groups}


def refuse_other_scale(model: str, scale: Mapping[str, float]) -> Callable[[Config], None]:
    """A check of a VAE's config: UserError if it scales latents otherwise than ``model``'s, whose shapes others have too."""

    def check(config: Config) -> None:
        told = {name: config[name] for name in scale}
        if told != scale:
            raise UserError(f"its config.json says {told}, {model}'s VAE has {scale}: it belongs to another model")

    return check
