"""Where the parts of an SDXL model are, in any of the layouts that people have.

- one checkpoint with everything (``sd_xl_base_1.0.safetensors``), named by ``path`` or ``transformer_path``, or in a folder;
- a diffusers folder: ``unet/``, ``vae/``, ``text_encoder/`` (CLIP-L), ``text_encoder_2/`` (CLIP-G), ``tokenizer/``, ``scheduler/``;
- ComfyUI's ``models`` folder: ``checkpoints/`` or ``diffusion_models/``, ``text_encoders/``, ``vae/``; or a folder of such files;
- any single part under its own key.

What the UNet's file holds besides it is taken from there.  Only headers are read here, and all that is missing or does not fit is
reported together.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import OpenedNetwork
from models.common.text_encoders import CLIP_NAMES, TokenizerFile
from models.sdxl.keys import EDM_MARKERS, MARKERS
from models.sdxl.networks import NETWORKS
from models.sdxl.options import Prediction, SdxlOptions
from models.sdxl.sizes import pooled_width
from utils.weights.tensor_files import open_tensor_file

log = logging.getLogger(__name__)

CHECKPOINTS = Place("checkpoints/**/*.safetensors")
COMFY_TEXT_ENCODERS = (Place("text_encoders/**/*.safetensors"), Place("clip/**/*.safetensors"), ANY_FILE)


def _text_encoder_places(folder: str) -> tuple[Place, ...]:
    # Releases hold the same weights a second time, as model.fp16.safetensors.
    return Place(f"{folder}/model.safetensors"), Place(f"{folder}/*.safetensors", as_folder=True), *COMFY_TEXT_ENCODERS


PLACES = {
    "transformer": (
        Place("unet/diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("sd_xl_*.safetensors"),
        CHECKPOINTS,
        Place("diffusion_models/**/*.safetensors"),
        Place("unet/**/*.safetensors"),
        ANY_FILE,
    ),
    "vae": (
        Place("vae/diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("vae/**/*.safetensors"),
        ANY_FILE,
    ),
    "text_encoder": _text_encoder_places("text_encoder"),
    "text_encoder_2": _text_encoder_places("text_encoder_2"),
}
"""Searched in this order; the first place that holds the part counts."""

TOKENIZER_FOLDERS = ("tokenizer", "tokenizer_2", "text_encoders/clip-vit-large-patch14", "clip-vit-large-patch14", ".")
"""Below ``[model] path``, and beside text encoder 1."""
TOKENIZER_SOURCE = (
    "It is tokenizer/ of any diffusers folder of SDXL, SD3 or FLUX.1, "
    "or vocab.json and merges.txt of https://huggingface.co/openai/clip-vit-large-patch14"
)


@dataclass(frozen=True)
class SdxlFiles:
    """What was found: opened networks, whose weights are still on the disk, and what the files say of the training."""

    transformer: OpenedNetwork
    vae: OpenedNetwork
    text_encoder: OpenedNetwork
    """CLIP-L."""
    text_encoder_2: OpenedNetwork
    """CLIP-G."""
    tokenizer: TokenizerFile
    """Both text encoders have the same."""
    prediction: Prediction | None
    zero_terminal_snr: bool | None


def find_files(options: SdxlOptions) -> SdxlFiles:
    """The parts that ``[model]`` names.  UserError with every part that is missing, ambiguous, damaged or does not fit."""
    if options.path and options.path.is_file():
        options = options.model_copy(update={"path": None, "transformer_path": options.transformer_path or options.path})
    search = FileSearch(options, NETWORKS, PLACES)
    transformer = search.part("transformer")
    config = transformer.config if transformer else None
    vae = search.part("vae", config and config["in_channels"], inside="transformer")
    # CLIP-G first: what it leaves of the UNet's text tells which of several files is the CLIP-L.
    clip_g = search.part("text_encoder_2", config and pooled_width(config), inside="transformer")
    rest = config["cross_attention_dim"] - clip_g.config["hidden_size"] if config and clip_g else None
    clip_l = search.part("text_encoder", rest, inside="transformer")
    tokenizer = search.tokenizer(TOKENIZER_FOLDERS, TOKENIZER_SOURCE, names=CLIP_NAMES)
    prediction, zero_terminal_snr = None, None
    if transformer:
        prediction, zero_terminal_snr, problem = read_training(search.found["transformer"])
        search.problems += [problem] if problem else []
    search.finish()
    if options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: SDXL has no image encoder")
    return SdxlFiles(transformer, vae, clip_l, clip_g, tokenizer, prediction, zero_terminal_snr)


def read_training(transformer: Path) -> tuple[Prediction | None, bool | None, str | None]:
    """What the model predicts and whether its schedule ends in pure noise, as far as its files say; and what cannot be trained."""
    if transformer.is_file():
        keys = open_tensor_file(transformer).entries
        if any(marker in keys for marker in EDM_MARKERS):
            return None, None, f"{transformer} was trained with EDM's schedule (CosXL, Playground), which is not supported"
        v_pred, zero_snr = (marker in keys for marker in MARKERS)
        return ("v_prediction", zero_snr, None) if v_pred else (None, None, None)
    scheduler = transformer.parent / "scheduler/scheduler_config.json"
    if not scheduler.is_file():
        return None, None, None
    try:
        config = json.loads(scheduler.read_text())
    except ValueError as error:
        return None, None, f"{scheduler} is not valid JSON: {error}"
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        return None, None, f"{scheduler}: prediction_type = {prediction!r} is not supported; supported are epsilon and v_prediction"
    return prediction, config.get("rescale_betas_zero_snr", False), None
