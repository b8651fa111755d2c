"""Where the parts of a FLUX.1 model are, in any of the layouts that people have.

- a diffusers folder: ``transformer/``, ``vae/``, ``text_encoder/`` and ``tokenizer/`` (CLIP-L), ``text_encoder_2/`` and
  ``tokenizer_2/`` (T5);
- the original release: ``flux1-*.safetensors`` and ``ae.safetensors``, with the text encoders of the diffusers folder;
- ComfyUI's ``models`` folder: ``diffusion_models/``, ``vae/``, ``text_encoders/``, or all in one in ``checkpoints/``;
- any single part under its own key.

Only headers are read here.  All that is missing or does not fit is reported together.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import OpenedNetwork
from models.common.text_encoders import CLIP_NAMES, TokenizerFile
from models.flux.networks import NETWORKS
from utils.config.schema import ModelOptions

log = logging.getLogger(__name__)

CHECKPOINTS = Place("checkpoints/**/*.safetensors")
TEXT_ENCODERS = (Place("text_encoders/**/*.safetensors"), Place("clip/**/*.safetensors"), CHECKPOINTS, ANY_FILE)
PLACES = {
    "transformer": (
        Place("transformer/*.safetensors", as_folder=True),
        Place("flux1-*.safetensors"),
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
    "text_encoder": (Place("text_encoder/*.safetensors", as_folder=True), *TEXT_ENCODERS),
    "text_encoder_2": (Place("text_encoder_2/*.safetensors", as_folder=True), *TEXT_ENCODERS),
}
"""Searched in this order; the first place that holds the part counts."""

CLIP_FOLDERS = ("tokenizer", "text_encoders/clip-vit-large-patch14", "clip-vit-large-patch14")
T5_FOLDERS = ("tokenizer_2", "text_encoders/t5-v1_1-xxl", "t5-v1_1-xxl")
"""Below ``[model] path``, and beside the text encoder."""
CLIP_SOURCE = (
    "It is tokenizer/ of the release on Hugging Face, "
    "or vocab.json and merges.txt of https://huggingface.co/openai/clip-vit-large-patch14"
)
T5_SOURCE = "It is tokenizer_2/ of the release on Hugging Face, or spiece.model of https://huggingface.co/google/t5-v1_1-xxl"


@dataclass(frozen=True)
class FluxFiles:
    """What was found: opened networks, whose weights are still on the disk, and the tokenizers of the two text encoders."""

    transformer: OpenedNetwork
    vae: OpenedNetwork
    text_encoder: OpenedNetwork
    """CLIP-L."""
    text_encoder_2: OpenedNetwork
    """T5."""
    tokenizer: TokenizerFile
    tokenizer_2: TokenizerFile
    variant: str


def find_files(options: ModelOptions) -> FluxFiles:
    """The parts that ``[model]`` names.  UserError with every part that is missing, ambiguous, damaged or does not fit."""
    search = FileSearch(options, NETWORKS, PLACES)
    transformer = search.part("transformer")
    config = transformer.config if transformer else {}
    vae = search.part("vae", config["in_channels"] // 4 if config else None, inside="transformer")
    clip = search.part("text_encoder", config.get("pooled_projection_dim"), inside="transformer")
    t5 = search.part("text_encoder_2", config.get("joint_attention_dim"), inside="transformer")
    tokenizer = search.tokenizer(CLIP_FOLDERS, CLIP_SOURCE, names=CLIP_NAMES)
    tokenizer_2 = search.tokenizer(T5_FOLDERS, T5_SOURCE, name="tokenizer_2", encoder="text_encoder_2")
    variant = None
    if transformer:
        variant, problem = _variant(options.variant, config["guidance_embeds"], search.found["transformer"])
        search.problems += [problem] if problem else []
    search.finish()
    if options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: FLUX.1 has no image encoder")
    return FluxFiles(transformer, vae, clip, t5, tokenizer, tokenizer_2, variant)


def _variant(chosen: str | None, has_guidance: bool, transformer: Path) -> tuple[str, str | None]:
    """The variant, and what is wrong with the chosen one."""
    if not has_guidance:
        problem = f"model.variant = {chosen!r}, but {transformer} has no guidance embedder: it is schnell; leave the key out"
        return "flux1-schnell", problem if chosen else None
    if chosen:
        return f"flux1-{chosen}", None
    variant = "flux1-kontext" if _is_named_kontext(transformer) else "flux1-dev"
    log.info("%s is taken for %s, as only names tell dev from Kontext; model.variant overrides it", transformer, variant)
    return variant, None


def _is_named_kontext(transformer: Path) -> bool:
    """Whether the file's name or the folder's ``model_index.json`` says so: nothing in the weights does."""
    if "kontext" in transformer.name.lower():
        return True
    try:
        index = json.loads((transformer.parent / "model_index.json").read_text())
    except (OSError, ValueError):
        return False
    return "Kontext" in str(index.get("_class_name"))
