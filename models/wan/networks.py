"""Wan's four networks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.common.networks import Config, Network
from models.wan.encoder_keys import clip_key_map, t5_key_map, vae_22_key_map, vae_key_map
from models.wan.keys import wan_key_map
from models.wan.sizes import clip_config, t5_config, transformer_config, vae_config
from models.wan.variants import variant_of
from utils.errors import UserError
from utils.formats.recognise import FileFacts
from utils.weights.keymap import KeyMap
from utils.weights.named import WeightSource
from utils.weights.tensor_files import TensorInfo


def _build_clip(config: Config) -> CLIPVisionModel:
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    # Not a weight, so nothing would fill it when the model is made on meta.
    positions = torch.arange(model.embeddings.num_positions, device="cpu").expand(1, -1)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return model


class ClipWeights(WeightSource):
    """The release holds two of the tensors with leading dimensions of size 1; the key map takes them off when it reads."""

    SQUEEZED = ("embeddings.class_embedding", "embeddings.position_embedding.weight")

    def names(self) -> dict[str, TensorInfo]:
        names = super().names()
        for name in set(self.SQUEEZED) & set(names):
            shape = names[name].shape
            while len(shape) > 1 and shape[0] == 1:
                shape = shape[1:]
            names[name] = names[name]._replace(shape=shape)
        return names


class VaeWeights(WeightSource):
    """The VAE of Wan 2.1 or that of Wan 2.2: diffusers and the release name them by two tables, and the one that fits is taken."""

    def __init__(self, path: Path | Sequence[Path], key_map: KeyMap):
        try:
            super().__init__(path, key_map)
        except UserError as error:
            try:
                super().__init__(path, vae_22_key_map())
            except UserError:
                raise error from None


TIED = "encoder.embed_tokens.weight"
"""Another name of UMT5's ``shared.weight``; files hold it or not."""

NETWORKS = {
    "transformer": Network(
        title="Wan transformer",
        key_map=wan_key_map,
        kinds=("WanModel", "WanTransformer3DModel"),
        config=transformer_config,
        build=WanTransformer3DModel.from_config,
        accept=variant_of,
        family="wan",
    ),
    "vae": Network(
        title="Wan VAE",
        key_map=vae_key_map,
        kinds=("AutoencoderKLWan",),
        config=vae_config,
        build=AutoencoderKLWan.from_config,
        width=lambda config: config["z_dim"],
        source=VaeWeights,
    ),
    "text_encoder": Network(
        title="UMT5 text encoder",
        key_map=t5_key_map,
        kinds=("umt5",),
        config=t5_config,
        build=lambda config: UMT5EncoderModel(UMT5Config(**config)),
        width=lambda config: config["d_model"],
        optional=frozenset([TIED]),
    ),
    "image_encoder": Network(
        title="CLIP vision encoder",
        key_map=clip_key_map,
        kinds=("clip_vision_model",),
        config=clip_config,
        build=_build_clip,
        width=lambda config: config["hidden_size"],
        source=ClipWeights,
        in_folder=None,
    ),
}

FILE_FACTS = FileFacts(
    networks=NETWORKS,
    architecture=r"wan",
    key_map=lambda shapes: wan_key_map(),
    sizes={(30, 1536): "1.3B", (40, 5120): "14B", (30, 3072): "TI2V-5B"},
)
