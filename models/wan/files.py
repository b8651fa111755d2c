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

from models.common.text_encoders import TokenizerFile, find_tokenizer, tokenizer_inside
from models.wan.networks import NETWORKS, OpenedNetwork, open_network, variant_of
from utils.config.schema import ModelOptions
from utils.errors import UserError, listed

__all__ = ["WanFiles", "find_files", "transformer_config", "variant_of"]

log = logging.getLogger(__name__)

NAMED = 8
"""At most so many files are named in a message."""


@dataclass(frozen=True)
class Place:
    """Files below ``[model] path`` that may be a part: each of them, or all of them as one folder."""

    pattern: str
    as_folder: bool = False

    def candidates(self, root: Path) -> list[Path]:
        found = sorted(path for path in root.glob(self.pattern) if path.is_file())
        return sorted({path.parent for path in found}) if self.as_folder else found


ANY_FILE = Place("*.safetensors")
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
    search = _Search(options)
    transformer = search.part("transformer")
    config = transformer.config if transformer else {}
    search.part("vae", config.get("out_channels"))
    search.part("text_encoder", config.get("text_dim"))
    if config.get("image_dim"):
        search.part("image_encoder", config["image_dim"])
    elif transformer and options.image_encoder_path:
        log.warning("model.image_encoder_path has no effect: text to video uses no image encoder")
    tokenizer = search.tokenizer()
    if search.problems:
        raise UserError(listed(search.problems, "[model] cannot be used:"))
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
    return open_network("transformer", files.transformer).config


class _Search:
    """One look for all parts, which collects what is wrong."""

    def __init__(self, options: ModelOptions):
        self.options = options
        self.found: dict[str, Path] = {}
        self.problems: list[str] = []
        self.root = options.path
        if self.root and not self.root.is_dir():
            use = "is a file; single files are named with model.transformer_path, model.vae_path, …"
            self.problems.append(f"model.path = {self.root} {use if self.root.exists() else 'does not exist'}")
            self.root = None
        elif self.root and not options.transformer_path:
            self.problems += [
                f"model.path = {self.root} holds {TWO_TRANSFORMERS[name]}, which is not supported yet; supported is Wan 2.1"
                for name in TWO_TRANSFORMERS
                if (self.root / name).is_dir()
            ]

    def part(self, name: str, width: int | None = None) -> OpenedNetwork | None:
        """Find and open one part.  ``width``: what its size must be to fit the transformer, if that is known."""
        chosen: Path | None = getattr(self.options, f"{name}_path")
        if chosen:
            opened, problem = self._open(name, chosen, width)
            if opened:
                self.found[name] = chosen
            self.problems += [_indented(f"model.{name}_path: {problem}")] if problem else []
            return opened
        if self.root is None:
            if self.options.path is None:
                self.problems.append(f"no {NETWORKS[name].title}: set model.path (a folder) or model.{name}_path")
            return None
        rejected: list[str] = []
        for place in PLACES[name]:
            tried = [(path, *self._open(name, path, width)) for path in place.candidates(self.root)]
            fitting = [(path, opened) for path, opened, _ in tried if opened]
            if len(fitting) == 1:
                self.found[name], opened = fitting[0]
                return opened
            if fitting:
                several = ", ".join(str(path.relative_to(self.root)) for path, _ in fitting[:NAMED])
                self.problems.append(
                    f"model.path = {self.root} holds {len(fitting)} that may be the {NETWORKS[name].title}: {several}; "
                    f"choose one with model.{name}_path"
                )
                return None
            if place is not ANY_FILE:
                rejected += [problem for _, _, problem in tried if problem and problem not in rejected]
        looked = ", ".join(place.pattern for place in PLACES[name])
        problem = f"no {NETWORKS[name].title} in {self.root}; looked for {looked}; name it with model.{name}_path"
        self.problems.append(_indented("\n".join([problem, *rejected[:NAMED]])))
        return None

    def _open(self, name: str, path: Path, width: int | None) -> tuple[OpenedNetwork | None, str | None]:
        try:
            opened = open_network(name, path)
            if name == "transformer":
                variant_of(opened.config)
        except UserError as error:
            problem = str(error)
            return None, problem if str(path) in problem else f"{path}: {problem}"
        own_width = NETWORKS[name].width(opened.config)
        if width and own_width != width:
            return None, f"{path} has the width {own_width}, the transformer wants {width}; it belongs to another model"
        return opened, None

    def tokenizer(self) -> TokenizerFile | None:
        """The tokenizer that is named, or below ``[model] path``, or beside or in the text encoder's file."""
        if chosen := self.options.tokenizer_path:
            found = find_tokenizer(chosen)
            missing = f"model.tokenizer_path = {chosen}: there is no tokenizer.json and no spiece.model"
        else:
            roots = self._tokenizer_roots()
            found = next(filter(None, (find_tokenizer(root / folder) for root in roots for folder in TOKENIZER_FOLDERS)), None)
            if found is None and "text_encoder" in self.found:
                found = tokenizer_inside(self.found["text_encoder"])
            below = ", ".join(TOKENIZER_FOLDERS[:-1])
            where = f".json and no spiece.model in {', '.join(map(str, roots))}, nor below in {below}" if roots else ""
            missing = f"no tokenizer{where}; name its folder with model.tokenizer_path"
        if found:
            self.problems += filter(None, [found.problem()])
        elif chosen or self.root or self.options.path is None:  # else the path is the problem, and was reported
            self.problems.append(f"{missing}. {TOKENIZER_SOURCE}")
        return found

    def _tokenizer_roots(self) -> list[Path]:
        weights = self.found.get("text_encoder")
        beside = [weights if weights.is_dir() else weights.parent] if weights else []
        return list(dict.fromkeys([*([self.root] if self.root else []), *beside]))


def _indented(problem: str) -> str:
    """The further lines of a problem below its first one."""
    return problem.replace("\n", "\n      ")
