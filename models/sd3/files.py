"""Where the parts of an SD3 model are, in any of the layouts that people have.

- a diffusers folder: ``transformer/``, ``vae/``, ``text_encoder/`` (CLIP-L), ``text_encoder_2/`` (CLIP-G), ``text_encoder_3/``
  (T5), ``tokenizer/``, ``tokenizer_3/``;
- an all-in-one checkpoint: the transformer, mostly with the VAE, sometimes with the text encoders;
- ComfyUI's ``models`` folder: ``checkpoints/`` or ``diffusion_models/``, ``text_encoders/``, ``vae/``; or a folder of such files;
- any single part under its own key.

What the transformer's file holds besides it is taken from there.  Only headers are read here, and all that is missing or does not
fit is reported together.
"""

import logging
from dataclasses import dataclass

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import OpenedNetwork
from models.common.text_encoders import CLIP_NAMES, TokenizerFile
from models.sd3.networks import NETWORKS
from models.sd3.options import Sd3Options

log = logging.getLogger(__name__)

CHECKPOINTS = Place("checkpoints/**/*.safetensors")
TEXT_ENCODERS = (Place("text_encoders/**/*.safetensors"), Place("clip/**/*.safetensors"), CHECKPOINTS, ANY_FILE)


def _text_encoder_places(folder: str) -> tuple[Place, ...]:
    # Releases hold the same weights a second time, as model.fp16.safetensors.
    return Place(f"{folder}/model.safetensors"), Place(f"{folder}/*.safetensors", as_folder=True), *TEXT_ENCODERS


PLACES = {
    "transformer": (
        Place("transformer/*.safetensors", as_folder=True),
        Place("diffusion_models/**/*.safetensors"),
        Place("unet/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
    "vae": (
        Place("vae/diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("vae/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
    "text_encoder": _text_encoder_places("text_encoder"),
    "text_encoder_2": _text_encoder_places("text_encoder_2"),
    "text_encoder_3": _text_encoder_places("text_encoder_3"),
}
"""Searched in this order; the first place that holds the part counts."""

CLIP_L_SHARE, CLIP_G_SHARE = 3 / 8, 5 / 8
"""Of the pooled text's width: 768 and 1280 of 2048.  It tells the two CLIPs apart, whose files have the same names inside."""

CLIP_FOLDERS = ("tokenizer", "tokenizer_2", "text_encoders/clip-vit-large-patch14", "clip-vit-large-patch14")
T5_FOLDERS = ("tokenizer_3", "text_encoders/t5-v1_1-xxl", "t5-v1_1-xxl")
"""Below ``[model] path``, and beside the text encoder."""
CLIP_SOURCE = (
    "It is tokenizer/ of any diffusers folder of SD3, SDXL or FLUX.1, "
    "or vocab.json and merges.txt of https://huggingface.co/openai/clip-vit-large-patch14"
)
T5_SOURCE = (
    "It is tokenizer_3/ of SD3's diffusers folder, tokenizer_2/ of FLUX.1's, "
    "or spiece.model of https://huggingface.co/google/t5-v1_1-xxl"
)
WITHOUT_T5 = "To train without T5 (its states are zeros then) set model.t5 = false"


@dataclass(frozen=True)
class Sd3Files:
    """What was found: opened networks, whose weights are still on the disk, and tokenizers."""

    transformer: OpenedNetwork
    vae: OpenedNetwork
    clip_l: OpenedNetwork
    clip_g: OpenedNetwork
    clip_tokenizer: TokenizerFile
    """Of both CLIPs."""
    t5: OpenedNetwork | None
    t5_tokenizer: TokenizerFile | None


def find_files(options: Sd3Options) -> Sd3Files:
    """The parts that ``[model]`` names.  UserError with every part that is missing, ambiguous, damaged or does not fit."""
    search = FileSearch(options, NETWORKS, PLACES)
    transformer = search.part("transformer")
    config = transformer.config if transformer else {}
    pooled = config.get("pooled_projection_dim")
    vae = search.part("vae", config.get("in_channels"), inside="transformer")
    clip_l = search.part("text_encoder", pooled and round(CLIP_L_SHARE * pooled), inside="transformer")
    clip_g = search.part("text_encoder_2", pooled and round(CLIP_G_SHARE * pooled), inside="transformer")
    clip_tokenizer = search.tokenizer(CLIP_FOLDERS, CLIP_SOURCE, names=CLIP_NAMES)
    t5, t5_tokenizer = _find_t5(search, config.get("joint_attention_dim")) if options.t5 else (None, None)
    search.finish()
    _warn_of_unused(options)
    return Sd3Files(transformer, vae, clip_l, clip_g, clip_tokenizer, t5, t5_tokenizer)


def _find_t5(search: FileSearch, width: int | None) -> tuple[OpenedNetwork | None, TokenizerFile | None]:
    known = len(search.problems)
    t5 = search.part("text_encoder_3", width, inside="transformer")
    if len(search.problems) > known:
        search.problems[-1] += f"\n      {WITHOUT_T5}"
    return t5, search.tokenizer(T5_FOLDERS, T5_SOURCE, name="tokenizer_3", encoder="text_encoder_3")


def _warn_of_unused(options: Sd3Options) -> None:
    if options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: SD3 has no image encoder")
    if not options.t5 and (options.text_encoder_3_path or options.tokenizer_3_path or options.t5_dropout):
        log.warning("model.text_encoder_3_path, model.tokenizer_3_path and model.t5_dropout have no effect: model.t5 = false")
