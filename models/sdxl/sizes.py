"""The UNet's and the VAE's config, read from the shapes of their tensors; a ``config.json`` beside the weights says the rest.

Each function takes (tensors by diffusers name, config.json or None) and raises KeyError, with the tensor's name, for files that are
not whole.
"""

from models.common.kl_vae import kl_vae_sizes
from models.common.networks import Config, Names
from utils.errors import UserError, listed

HEAD_DIM = 64
"""Width of an attention head in the released model (320 / 5, 640 / 10, 1280 / 20)."""
SIZE_DIM = 256
"""Width of the sinusoid of each of the six sizes in the released model."""
NUM_SIZES = 6
VAE_SCALE = 0.13025
"""Of the released VAE; diffusers' own default is that of Stable Diffusion 1."""


def unet_config(names: Names, given: Config | None) -> Config:
    """The arguments of diffusers' UNet2DConditionModel."""
    given = given or {}
    add_embedding = names["add_embedding.linear_1.weight"]  # only SDXL's kin has it
    levels = _count(names, "down_blocks.")
    channels = [names[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)]
    depths = [_count(names, f"down_blocks.{level}.attentions.0.transformer_blocks.") for level in range(levels)]
    attends = [depth > 0 for depth in depths]
    deepest = f"down_blocks.{levels - 1}.attentions.0."
    config = {
        "in_channels": names["conv_in.weight"].shape[1],
        "out_channels": names["conv_out.weight"].shape[0],
        "layers_per_block": _count(names, "down_blocks.0.resnets."),
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": names[f"{deepest}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": len(names[f"{deepest}proj_in.weight"].shape) == 2,
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": add_embedding.shape[1],
    }
    different = [
        f"{name}: {given[name]} in config.json, {value} by the weights"
        for name, value in config.items()
        # Of the levels without attention a config may tell any depth.
        if name in given and name != "transformer_layers_per_block" and given[name] != value
    ]
    if different:
        raise UserError(listed(different, "config.json is of another model:"))
    if "attention_head_dim" not in given and channels[-1] % HEAD_DIM:
        raise UserError(
            f"its width {channels[-1]} is not a multiple of {HEAD_DIM}, the width of a head in the released model; "
            "put the model's config.json beside the file, it tells the number of heads"
        )
    released = {
        "attention_head_dim": [width // HEAD_DIM for width in channels],  # the number of heads; diffusers calls it so
        "norm_num_groups": 32,
        "addition_time_embed_dim": SIZE_DIM,
    }
    return {**config, **{name: given.get(name, value) for name, value in released.items()}}


def vae_config(names: Names, given: Config | None) -> Config:
    """The arguments of diffusers' AutoencoderKL."""
    return {"scaling_factor": VAE_SCALE, **kl_vae_sizes(names, given)}


def pooled_width(config: Config) -> int:
    """Width of the pooled text that the UNet takes beside the six sizes."""
    return config["projection_class_embeddings_input_dim"] - NUM_SIZES * config["addition_time_embed_dim"]


def _count(names: Names, prefix: str) -> int:
    """Number of parts ``<prefix>0.``, ``<prefix>1.``, …"""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
