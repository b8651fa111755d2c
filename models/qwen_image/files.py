"""Where the parts of a Qwen-Image model are, in any of the layouts that people have, and which of the models it is.

- the release, a diffusers folder: ``transformer/``, ``vae/``, ``text_encoder/``, ``tokenizer/``, for editing ``processor/``;
- ComfyUI's ``models`` folder: ``diffusion_models/``, ``text_encoders/``, ``vae/``, ``checkpoints/``; or a folder of such files;
- any single part under its own key.

Only headers are read here.  All that is missing or does not fit is reported together.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import OpenedNetwork
from models.common.text_encoders import QWEN_NAMES, TokenizerFile
from models.qwen_image.keys import EDIT_2511_MARK
from models.qwen_image.networks import NETWORKS
from utils.config.schema import ModelOptions
from utils.errors import UserError
from utils.weights.tensor_files import open_tensor_file

log = logging.getLogger(__name__)

CHECKPOINTS = Place("checkpoints/**/*.safetensors")
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
    "text_encoder": (
        Place("text_encoder/*.safetensors", as_folder=True),
        Place("text_encoders/**/*.safetensors"),
        Place("clip/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
}
"""Searched in this order; the first place that holds the part counts."""

TOKENIZER_FOLDERS = ("tokenizer", "processor", "text_encoders/qwen2.5-vl", "qwen2.5-vl", ".")
"""Below ``[model] path``, and beside the text encoder."""
TOKENIZER_SOURCE = (
    "It is tokenizer/ of the release, or tokenizer.json of https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct; "
    "ComfyUI's text encoder file carries none"
)

IMAGE, EDIT, EDIT_PLUS, EDIT_2511 = "qwen-image", "qwen-image-edit", "qwen-image-edit-plus", "qwen-image-edit-2511"
VARIANTS = (IMAGE, EDIT, EDIT_PLUS, EDIT_2511)
PIPELINES = {"QwenImagePipeline": IMAGE, "QwenImageEditPipeline": EDIT, "QwenImageEditPlusPipeline": EDIT_PLUS}
"""By ``_class_name`` in a diffusers folder's ``model_index.json``."""
FILE_NAMES = {"2511": EDIT_2511, "2509": EDIT_PLUS, "edit": EDIT}
"""Parts of the names that the files have in ComfyUI's distribution; the first that occurs counts."""


@dataclass(frozen=True)
class QwenImageFiles:
    """What was found: files of weights, or folders of them, and what they are."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: TokenizerFile
    image_processor: Path | None
    """The text encoder's ``preprocessor_config.json``, if the layout has one."""
    config: dict[str, Any]
    """The arguments of diffusers' QwenImageTransformer2DModel."""
    variant: str


def find_files(options: ModelOptions, variant: str | None = None) -> QwenImageFiles:
    """The parts that ``[model]`` names.  ``variant``: what the user says it is.

    UserError with every part that is missing, ambiguous, damaged or does not fit.
    """
    search = FileSearch(options, NETWORKS, PLACES)
    transformer = search.part("transformer")
    config = transformer.config if transformer else {}
    search.part("vae", config.get("out_channels"), inside="transformer")
    search.part("text_encoder", config.get("joint_attention_dim"), inside="transformer")
    if options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: Qwen-Image's text encoder is what looks at pictures")
    tokenizer = search.tokenizer(TOKENIZER_FOLDERS, TOKENIZER_SOURCE, names=QWEN_NAMES)
    found = IMAGE
    if transformer:
        try:
            found = variant_of(options.path, search.found["transformer"], transformer, variant)
        except UserError as error:
            search.problems.append(str(error))
    search.finish()
    assert tokenizer is not None
    processor = options.path / "processor/preprocessor_config.json" if options.path else None
    return QwenImageFiles(
        transformer=search.found["transformer"],
        vae=search.found["vae"],
        text_encoder=search.found["text_encoder"],
        tokenizer=tokenizer,
        image_processor=processor if processor and processor.is_file() else None,
        config={**config, "zero_cond_t": found == EDIT_2511},
        variant=found,
    )


def variant_of(root: Path | None, path: Path, transformer: OpenedNetwork, chosen: str | None) -> str:
    """Which model it is.  What the weights say (only Edit-2511 says it) and what the user says must not differ.

    Else an export of ours, the pipeline that a diffusers folder names, or the name of the transformer's file tells it: the tensors
    of the four models have the same names and shapes.
    """
    files = [open_tensor_file(file) for file in transformer.source.files]
    marked = any(key.endswith(EDIT_2511_MARK) for file in files for key in file.entries)
    is_2511 = marked or transformer.config["zero_cond_t"]
    if chosen:
        if is_2511 and chosen != EDIT_2511:
            raise UserError(
                f"model.variant = {chosen!r}, but {path} says that it is {EDIT_2511} (zero_cond_t): "
                "set model.variant to that, or remove it"
            )
        if chosen == EDIT_2511 and not is_2511:
            log.warning("%s does not say that it is %s; model.variant is taken at its word", path, EDIT_2511)
        return chosen
    if is_2511:
        return EDIT_2511
    told = {getattr(file, "metadata", {}).get("modelspec.architecture") for file in files}
    if exported := told.intersection(VARIANTS):
        return exported.pop()
    if pipeline := _pipeline_in(root):
        return PIPELINES.get(pipeline, IMAGE)
    name = path.name.lower()
    found = next((variant for part, variant in FILE_NAMES.items() if part in name), IMAGE)
    log.info("%s is taken for %s by its name; model.variant says otherwise if that is wrong", path, found)
    return found


def _pipeline_in(root: Path | None) -> str | None:
    """The pipeline's class that a diffusers folder names."""
    file = root / "model_index.json" if root else None
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a diffusers model's index (a JSON table with `_class_name`)") from error
