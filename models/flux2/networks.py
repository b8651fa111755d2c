"""FLUX.2's three networks."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from models.common.networks import Config, Network
from models.flux2.encoder_keys import BATCH_COUNT, decoder_key_map, vae_key_map
from models.flux2.keys import flux2_key_map
from models.flux2.sizes import HIDDEN_STATES, decoder_kind, text_encoder_config, text_width, transformer_config, vae_config
from utils.formats.recognise import FileFacts
from utils.weights.named import WeightSource
from utils.weights.tensor_files import TensorInfo

DECODERS = {"mistral": (MistralModel, MistralConfig), "qwen3": (Qwen3Model, Qwen3Config)}
LATENTS_PER_TOKEN = 4
"""A token of the transformer is made of 2 x 2 latents of the VAE."""


def variant_of(config: Config) -> str:
    """``flux2-dev`` or ``flux2-klein``, by the transformer's config: only dev is told a guidance."""
    return "flux2-dev" if config["guidance_embeds"] else "flux2-klein"


def _build_vae(config: Config) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2.from_config(config)
    # Files hold it or not, so nothing would fill it when the model is made on meta.
    vae.bn.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device="cpu"))
    return vae


def _build_text_encoder(config: Config) -> nn.Module:
    """The layers up to the last whose state is read, without the final norm, which no state that is read goes through."""
    model_class, config_class = DECODERS[config["kind"]]
    arguments = config_class(**{name: value for name, value in config.items() if name != "kind"})
    model = model_class(arguments)
    model.norm = nn.Identity()
    # Its tables are no weights, so nothing would fill them when the model is made on meta.
    with torch.device("cpu"):
        model.rotary_emb = type(model.rotary_emb)(arguments)
    return model


class DecoderWeights(WeightSource):
    """The language model's weights up to the last layer that is read."""

    def names(self) -> dict[str, TensorInfo]:
        names = super().names()
        layers = HIDDEN_STATES[decoder_kind(names)][-1]
        return {name: info for name, info in names.items() if name != "norm.weight" and _layer(name) < layers}


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else 0


NETWORKS = {
    "transformer": Network(
        title="FLUX.2 transformer",
        key_map=flux2_key_map,
        kinds=("Flux2Transformer2DModel",),
        config=transformer_config,
        build=Flux2Transformer2DModel.from_config,
        family="flux2",
    ),
    "vae": Network(
        title="FLUX.2 VAE",
        key_map=vae_key_map,
        kinds=("AutoencoderKLFlux2",),
        config=vae_config,
        build=_build_vae,
        width=lambda config: LATENTS_PER_TOKEN * config["latent_channels"],
        optional=frozenset([BATCH_COUNT]),
    ),
    "text_encoder": Network(
        title="text encoder (Mistral Small 3 for dev, Qwen3 for Klein)",
        key_map=decoder_key_map,
        kinds=("mistral3", "mistral", "qwen3"),
        config=text_encoder_config,
        build=_build_text_encoder,
        width=text_width,
        source=DecoderWeights,
        in_folder=None,
    ),
}

FILE_FACTS = FileFacts(
    networks=NETWORKS,
    architecture=r"flux[-.]?2",
    key_map=lambda shapes: flux2_key_map(),
    sizes={(8, 6144): "dev", (5, 3072): "Klein 4B", (8, 4096): "Klein 9B"},
    diffusers_kinds=frozenset(("lora", "dora", "lokr")),
)
