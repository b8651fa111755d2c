"""SDXL's four networks."""

from dataclasses import replace

from diffusers import AutoencoderKL, UNet2DConditionModel

from models.common.clip import clip_text_network
from models.common.kl_vae import kl_vae_key_map
from models.common.networks import Config, Network
from models.sdxl.keys import TEXT_ENCODER_PREFIXES, UNET_PREFIX, open_clip_key_map, unet_key_map
from models.sdxl.sizes import unet_config, vae_config
from utils.errors import UserError

PREFIXES = {
    "transformer": UNET_PREFIX,
    "vae": "first_stage_model.",
    **TEXT_ENCODER_PREFIXES,
}
"""Where each network is in a checkpoint of the whole model."""
LATENT_CHANNELS = 4


def refuse_other_inputs(config: Config) -> None:
    """UserError for a UNet that takes more than noisy latents."""
    channels = config["in_channels"]
    if channels != LATENT_CHANNELS:
        kind = " (for inpainting)" if channels == 2 * LATENT_CHANNELS + 1 else ""
        raise UserError(
            f"this is an SDXL UNet with {channels} channels in{kind}, which is not supported; supported is text to image"
        )


def refuse_other_latents(config: Config) -> None:
    """UserError for a VAE whose latents are not just scaled."""
    if config.get("latents_mean") is not None:
        raise UserError("its latents are normalised by channel (Playground 2.5), which type = 'sdxl' does not train")


NETWORKS = {
    "transformer": Network(
        title="SDXL UNet",
        key_map=unet_key_map,
        kinds=("UNet2DConditionModel",),
        config=unet_config,
        build=UNet2DConditionModel.from_config,
        accept=refuse_other_inputs,
        family="sdxl",
    ),
    "vae": Network(
        title="SDXL VAE",
        key_map=kl_vae_key_map,
        kinds=("AutoencoderKL",),
        config=vae_config,
        build=AutoencoderKL.from_config,
        width=lambda config: config["latent_channels"],
        accept=refuse_other_latents,
    ),
    "text_encoder": clip_text_network(
        "CLIP-L text encoder", projection=False, activation="quick_gelu", prefixes=(PREFIXES["text_encoder"],)
    ),
    # In a checkpoint it has OpenCLIP's names; single files and diffusers folders have transformers'.
    "text_encoder_2": replace(
        clip_text_network("CLIP-G text encoder", projection=True, activation="gelu"),
        key_map=lambda: open_clip_key_map(PREFIXES["text_encoder_2"]),
    ),
}
