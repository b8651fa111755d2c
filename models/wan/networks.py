"""Wan's four networks."""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.common.networks import Config, Network
from models.wan.encoder_keys import clip_key_map, t5_key_map, vae_key_map
from models.wan.keys import wan_key_map
from models.wan.sizes import clip_config, t5_config, transformer_config, vae_config
from utils.checkpoints.tensor_files import TensorInfo
from utils.checkpoints.weights import WeightSource
from utils.errors import UserError

UNSUPPORTED = {
    (36, 16, True, True): "Wan 2.1 first and last frame to video (flf2v)",
    (36, 16, False, False): "Wan 2.2 I2V-A14B",
    (48, 48, False, False): "Wan 2.2 TI2V-5B",
    (48, 16, True, False): "Wan Fun Control",
}
SUPPORTED = {(16, 16, False, False): "wan-t2v", (36, 16, True, False): "wan-i2v"}
"""Variants by (channels in, channels out, with CLIP branch, with position embedding of the CLIP branch)."""


def variant_of(config: Config) -> str:
    """``wan-t2v`` or ``wan-i2v``, by the transformer's config.  UserError, with what was recognised, for any other."""
    with_image, with_positions = config.get("image_dim") is not None, config.get("pos_embed_seq_len") is not None
    signature = (config["in_channels"], config["out_channels"], with_image, with_positions)
    if signature in SUPPORTED:
        return SUPPORTED[signature]
    what = UNSUPPORTED.get(signature, f"an unknown Wan model with {signature[0]} channels in and {signature[1]} out")
    raise UserError(f"this is {what}, which is not supported yet; supported are Wan 2.1 text to video and image to video")


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
        title="Wan 2.1 VAE",
        key_map=vae_key_map,
        kinds=("AutoencoderKLWan",),
        config=vae_config,
        build=AutoencoderKLWan.from_config,
        width=lambda config: config["z_dim"],
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
    ),
}
