"""Where the parts of a Wan model are, in any of the layouts that people have.

- a diffusers folder: ``transformer/``, ``vae/``, ``text_encoder/``, ``tokenizer/``, ``image_encoder/``, ``image_processor/``;
- the original release: ``diffusion_pytorch_model*.safetensors``, ``config.json``, two or three ``.pth``, ``google/umt5-xxl/``;
- ComfyUI's ``models`` folder: ``diffusion_models/``, ``text_encoders/``, ``vae/``, ``clip_vision/``; or a folder of such files;
- any single part under its own key.

Only headers are read here.  All that is missing or does not fit is reported together.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import open_network
from models.common.text_encoders import TokenizerFile
from models.wan.networks import NETWORKS, variant_of
from utils.config.schema import ModelOptions

__all__ = ["WanFiles", "find_files", "transformer_config", "variant_of"]

log = logging.getLogger(__name__)

PLACES = {
    "transformer": (
        Place("transformer/*.safetensors", as_folder=True),
        Place("diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("diffusion_models/**/*.safetensors"),
        Place("unet/**/*.safetensors"),
        ANY_FILE,
    ),
    "vae": (
        Place("vae/diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("Wan2.1_VAE.pth"),
        Place("vae/**/*.safetensors"),
        ANY_FILE,
    ),
    "text_encoder": (
        Place("text_encoder/*.safetensors", as_folder=True),
        Place("models_t5_umt5-xxl-enc-*.pth"),
        Place("text_encoders/**/*.safetensors"),
        Place("clip/**/*.safetensors"),
        ANY_FILE,
    ),
    "image_encoder": (
        Place("image_encoder/*.safetensors", as_folder=True),
        Place("models_clip_open-clip-xlm-roberta-*.pth"),
        Place("clip_vision/**/*.safetensors"),
        ANY_FILE,
    ),
}
"""Searched in this order; the first place that holds the part counts."""

TWO_TRANSFORMERS = {"transformer_2": "Wan 2.2 A14B (transformer_2/)", "high_noise_model": "Wan 2.2 A14B (high_noise_model/)"}
"""Folders that tell a model whose shapes are those of a supported one."""

TOKENIZER_FOLDERS = ("tokenizer", "google/umt5-xxl", "text_encoders/umt5-xxl", "umt5-xxl", ".")
"""Below ``[model] path``, and beside the text encoder."""
TOKENIZER_SOURCE = (
    "It is google/umt5-xxl/ of the original release, tokenizer/ of the diffusers one, "
    "or tokenizer.json of https://huggingface.co/google/umt5-xxl"
)


@dataclass(frozen=True)
class WanFiles:
    """What was found: files of weights, or folders of them."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: TokenizerFile
    image_encoder: Path | None
    """Only for image to video."""
    image_processor: Path | None
    """The image encoder's ``preprocessor_config.json``, if the layout has one."""


def find_files(options: ModelOptions) -> WanFiles:
    """The parts that ``[model]`` names.  UserError with every part that is missing, ambiguous, damaged or does not fit."""
    search = FileSearch(options, NETWORKS, PLACES)
    if search.root and not options.transformer_path:
        search.problems += [
            f"model.path = {search.root} holds {told}, which is not supported yet; supported is Wan 2.1"
            for name, told in TWO_TRANSFORMERS.items()
            if (search.root / name).is_dir()
        ]
    transformer = search.part("transformer")
    config = transformer.config if transformer else {}
    search.part("vae", config.get("out_channels"))
    search.part("text_encoder", config.get("text_dim"))
    if config.get("image_dim"):
        search.part("image_encoder", config["image_dim"])
    elif transformer and options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: text to video uses no image encoder")
    tokenizer = search.tokenizer(TOKENIZER_FOLDERS, TOKENIZER_SOURCE)
    search.finish()
    assert tokenizer is not None
    processor = options.path / "image_processor/preprocessor_config.json" if options.path else None
    return WanFiles(
        transformer=search.found["transformer"],
        vae=search.found["vae"],
        text_encoder=search.found["text_encoder"],
        tokenizer=tokenizer,
        image_encoder=search.found.get("image_encoder"),
        image_processor=processor if processor and processor.is_file() else None,
    )


def transformer_config(files: WanFiles) -> dict[str, Any]:
    """The arguments of diffusers' WanTransformer3DModel."""
    return open_network(NETWORKS["transformer"], files.transformer).config
