"""Where the parts of a FLUX.2 model are, in any of the layouts that people have.

- a diffusers folder, which the released repositories are too: ``transformer/``, ``vae/``, ``text_encoder/``, ``tokenizer/``;
- the original release: ``flux2-dev.safetensors`` or ``flux-2-klein-*.safetensors``, ``ae.safetensors``, with ``text_encoder/`` and
  ``tokenizer/``;
- ComfyUI's ``models`` folder: ``diffusion_models/``, ``text_encoders/``, ``vae/``, ``checkpoints/``; or a folder of such files;
- any single part under its own key.

Only headers are read here.  All that is missing or does not fit is reported together.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import Config
from models.flux2.chat import ChatTokenizer
from models.flux2.networks import NETWORKS, variant_of
from utils.config.schema import ModelOptions

log = logging.getLogger(__name__)

CHECKPOINTS = Place("checkpoints/**/*.safetensors")
PLACES = {
    "transformer": (
        Place("transformer/*.safetensors", as_folder=True),
        Place("flux2-*.safetensors"),
        Place("flux-2-*.safetensors"),
        Place("diffusion_models/**/*.safetensors"),
        Place("unet/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
    "vae": (
        Place("vae/diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("ae.safetensors"),
        Place("vae/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
    "text_encoder": (
        Place("text_encoder/*.safetensors", as_folder=True),
        Place("text_encoders/**/*.safetensors"),
        Place("clip/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
}
"""Searched in this order; the first place that holds the part counts."""

TOKENIZER_FOLDERS = ("tokenizer", ".")
"""Below ``[model] path``, and beside the text encoder."""
TOKENIZER_SOURCES = {
    "flux2-dev": "It is tokenizer/ of https://huggingface.co/black-forest-labs/FLUX.2-dev",
    "flux2-klein": "It is tokenizer/ of https://huggingface.co/black-forest-labs/FLUX.2-klein-4B, the same for 9B",
}


@dataclass(frozen=True)
class Flux2Files:
    """What was found: files of weights, or folders of them."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: ChatTokenizer
    config: Config
    """The arguments of diffusers' Flux2Transformer2DModel."""


def find_files(options: ModelOptions) -> Flux2Files:
    """The parts that ``[model]`` names.  UserError with every part that is missing, ambiguous, damaged or does not fit."""
    search = FileSearch(options, NETWORKS, PLACES)
    transformer = search.part("transformer")
    config = transformer.config if transformer else {}
    search.part("vae", config.get("in_channels"), inside="transformer")
    search.part("text_encoder", config.get("joint_attention_dim"), inside="transformer")
    source = TOKENIZER_SOURCES[variant_of(config)] if config else " or ".join(TOKENIZER_SOURCES.values())
    found = search.tokenizer(TOKENIZER_FOLDERS, source, names={"tokenizer.json": "json"})
    tokenizer = ChatTokenizer(found.path.parent) if found else None
    if tokenizer and (problem := tokenizer.problem()):
        search.problems.append(f"{problem}. {source}")
    if options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: FLUX.2 uses no image encoder")
    search.finish()
    assert tokenizer is not None
    return Flux2Files(
        transformer=search.found["transformer"],
        vae=search.found["vae"],
        text_encoder=search.found["text_encoder"],
        tokenizer=tokenizer,
        config=config,
    )
