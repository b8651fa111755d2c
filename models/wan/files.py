"""Where the parts of a Wan model are, in any of the layouts that people have.

- a diffusers folder: ``transformer/``, ``vae/``, ``text_encoder/``, ``tokenizer/``, ``image_encoder/``, ``image_processor/``, and
  ``transformer_2/`` of Wan 2.2 A14B;
- the original release: ``diffusion_pytorch_model*.safetensors``, ``config.json``, two or three ``.pth``, ``google/umt5-xxl/``; of
  Wan 2.2 A14B ``high_noise_model/`` and ``low_noise_model/``;
- ComfyUI's ``models`` folder: ``diffusion_models/``, ``text_encoders/``, ``vae/``, ``clip_vision/``, or all in one in
  ``checkpoints/``; or a folder of such files;
- any single part under its own key.

Only headers are read here.  All that is missing or does not fit is reported together.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.common.files import ANY_FILE, FileSearch, Place
from models.common.networks import open_network
from models.common.text_encoders import TokenizerFile
from models.wan.networks import NETWORKS
from models.wan.options import WanOptions
from models.wan.variants import VARIANTS, Expert, Trained, expert_named, variant_of

__all__ = ["WanFiles", "find_files", "transformer_config", "variant_of"]

log = logging.getLogger(__name__)

CHECKPOINTS = Place("checkpoints/**/*.safetensors")
PLACES = {
    "transformer": (
        Place("transformer/*.safetensors", as_folder=True),
        Place("diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("diffusion_models/**/*.safetensors"),
        Place("unet/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
    "vae": (
        Place("vae/diffusion_pytorch_model*.safetensors", as_folder=True),
        Place("Wan2.*_VAE.pth"),
        Place("vae/**/*.safetensors"),
        CHECKPOINTS,
        ANY_FILE,
    ),
    "text_encoder": (
        Place("text_encoder/*.safetensors", as_folder=True),
        Place("models_t5_umt5-xxl-enc-*.pth"),
        Place("text_encoders/**/*.safetensors"),
        Place("clip/**/*.safetensors"),
        CHECKPOINTS,
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

EXPERT_FOLDERS = (
    Place("transformer_2/*.safetensors", as_folder=True),
    Place("high_noise_model/*.safetensors", as_folder=True),
    Place("low_noise_model/*.safetensors", as_folder=True),
)
"""Where the two transformers of Wan 2.2 A14B are besides."""


@dataclass(frozen=True)
class ExpertPlace(Place):
    """Of the files in a place those that are one expert by their name."""

    expert: Expert = "high"

    def candidates(self, root: Path) -> list[Path]:
        return [path for path in super().candidates(root) if expert_named(path) == self.expert]


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
    """Of Wan 2.2 A14B the one for high noise, or the only one that is trained."""
    transformer_2: Path | None
    """The one for low noise, if both are trained."""
    vae: Path
    text_encoder: Path
    tokenizer: TokenizerFile
    image_encoder: Path | None
    """Only for Wan 2.1 image to video."""
    image_processor: Path | None
    """The image encoder's ``preprocessor_config.json``, if the layout has one."""
    expert: Trained | None
    """Which of the two transformers of Wan 2.2 A14B are trained."""


def find_files(options: WanOptions) -> WanFiles:
    """The parts that ``[model]`` names.  UserError with every part that is missing, ambiguous, damaged or does not fit."""
    expert = _expert(options)
    parts = _parts(options, expert)
    networks, places = dict(NETWORKS), dict(PLACES)
    for part, role in parts.items():
        if role:
            networks[part] = replace(NETWORKS["transformer"], title=f"Wan transformer for {role} noise")
            everywhere = (*EXPERT_FOLDERS, *PLACES["transformer"])
            places[part] = tuple(ExpertPlace(place.pattern, place.as_folder, role) for place in everywhere)
    search = FileSearch(options, networks, places)
    opened = {part: search.part(part) for part in parts}
    transformer = next(iter(opened.values()))
    config = transformer.config if transformer else {}
    if transformer:
        search.problems += _misplaced(options, config, expert, parts)
    if all(opened.values()):
        search.problems += _different(*(found.config for found in opened.values()))
    search.part("vae", config.get("out_channels"))
    search.part("text_encoder", config.get("text_dim"))
    if config.get("image_dim"):
        search.part("image_encoder", config["image_dim"])
    elif transformer and options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: this model uses no image encoder")
    tokenizer = search.tokenizer(TOKENIZER_FOLDERS, TOKENIZER_SOURCE)
    search.finish()
    assert tokenizer is not None
    processor = options.path / "image_processor/preprocessor_config.json" if options.path else None
    return WanFiles(
        transformer=search.found[next(iter(parts))],
        transformer_2=search.found["transformer_2"] if len(parts) > 1 else None,
        vae=search.found["vae"],
        text_encoder=search.found["text_encoder"],
        tokenizer=tokenizer,
        image_encoder=search.found.get("image_encoder"),
        image_processor=processor if processor and processor.is_file() else None,
        expert=expert if VARIANTS[variant_of(config, expert)].boundary else None,
    )


def _expert(options: WanOptions) -> Trained | None:
    """Which experts of Wan 2.2 A14B are meant; None if nothing speaks of experts."""
    if options.expert:
        return options.expert
    if options.transformer_2_path:
        return "both"
    if options.transformer_path:
        return expert_named(options.transformer_path)
    experts = _experts_in(options.path)
    return "both" if len(experts) > 1 else next(iter(experts), None)


def _parts(options: WanOptions, expert: Trained | None) -> dict[str, Expert | None]:
    """The transformers to look for, each the name of its part and which expert it is."""
    if expert == "both":
        return {"transformer": "high", "transformer_2": "low"}
    if expert == "low" and options.transformer_2_path:
        return {"transformer_2": "low"}
    return {"transformer": expert}


def _experts_in(root: Path | None) -> set[Expert]:
    """The experts in a folder; none if it holds transformers beside them, of which one may be meant."""
    if root is None or not root.is_dir():
        return set()
    named = {expert_named(path) for place in (*EXPERT_FOLDERS, *PLACES["transformer"]) for path in place.candidates(root)}
    return set() if None in named else named


def _misplaced(
    options: WanOptions, config: dict[str, Any], expert: Trained | None, parts: Mapping[str, Expert | None]
) -> list[str]:
    """Keys that do not fit the transformer that was found."""
    variant = VARIANTS[variant_of(config, expert)]
    problems = []
    if variant.boundary is None:
        for key in ("expert", "transformer_2_path"):
            if value := getattr(options, key):
                shown = f"model.{key} = {str(value)!r}"
                problems.append(f"{shown} is for Wan 2.2 A14B, which has two transformers; this is {variant.title}")
    for part, role in parts.items():
        path = getattr(options, f"{part}_path")
        named = path and expert_named(path)
        if role and named and named != role:
            problems.append(
                f"model.{part}_path is the transformer for {role} noise with model.expert = {expert!r}, but by its name {path} is "
                f"the one for {named} noise"
            )
    if options.transformer_path and options.transformer_path == options.transformer_2_path:
        problems.append(f"model.transformer_path and model.transformer_2_path are the same: {options.transformer_path}")
    # Only the shape of 2.2's image to video tells it; its text to video may be any file beside a folder of both experts.
    beside_experts = variant is VARIANTS["wan-t2v"] and options.transformer_path and _experts_in(options.path)
    if expert is None and (variant.boundary is not None or beside_experts):
        problems.append(
            "it is not known which of the two transformers of Wan 2.2 A14B is meant; set model.expert to 'high' or 'low' "
            "(noise), or name the file with model.transformer_path"
        )
    if options.first_frame and variant is not VARIANTS["wan-ti2v"]:
        problems.append(f"model.first_frame = true is for Wan 2.2 TI2V-5B; this is {variant.title}")
    return problems


def _different(config: dict[str, Any], other: dict[str, Any] | None = None) -> list[str]:
    """What keeps two transformers from being those of one model."""
    differences = [f"{name} {config[name]} and {other[name]}" for name in config if other and config[name] != other[name]]
    return [f"the two transformers are not of one model: {', '.join(differences)}"] if differences else []


def transformer_config(files: WanFiles) -> dict[str, Any]:
    """The arguments of diffusers' WanTransformer3DModel."""
    return open_network(NETWORKS["transformer"], files.transformer).config
