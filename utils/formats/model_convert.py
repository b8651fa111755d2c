"""A whole model's file in another layout: the released names that ComfyUI reads, or a folder as diffusers has it."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError
from utils.formats.export import PLACE_FOR_HASH, ReleasedTensors, on_meta, write_checked
from utils.formats.recognise import FoundNetwork, KnownFamily, OpenedWeights
from utils.formats.run_exports import WeightsOfFiles
from utils.weights.scaled_fp8 import with_scales
from utils.weights.tensor_files import OPENERS, TensorFile, TensorInfo, open_tensor_file

DIFFUSERS_FILE, ENCODER_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""Of a diffusers model, and of a text or picture encoder, which is one of transformers."""


def open_model_files(path: Path) -> list[TensorFile]:
    """A file, or the shards in a folder.  UserError for a folder without any."""
    if not path.is_dir():
        return [with_scales(open_tensor_file(path))]
    files = sorted(file for file in path.iterdir() if file.suffix in OPENERS)
    if not files:
        below = sorted({str(file.parent) for file in path.glob("*/*.safetensors")})
        raise UserError(f"{path} holds no weights" + (f"; name one of {', '.join(below)}" if below else ""))
    return [with_scales(open_tensor_file(file)) for file in files]


def entries_of(files: Sequence[TensorFile]) -> dict[str, TensorInfo]:
    return {key: info for file in files for key, info in file.entries.items()}


def marks_in(entries: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors without values, which say something by being there."""
    return [key for key, info in entries.items() if 0 in info.shape]


def leftover(entries: Mapping[str, TensorInfo], networks: Sequence[FoundNetwork]) -> list[str]:
    """Keys that belong to none of the networks."""
    known = {key for network in networks for key in network.keys}
    return [key for key, info in entries.items() if key not in known and 0 not in info.shape]


def to_comfy(path: Path, out: Path, networks: Sequence[FoundNetwork], metadata: Mapping[str, str]) -> list[str]:
    """Write a network, or a file of several, in released names.  A file of several keeps what stands before the names of each.

    Returns what is to be told: nothing.
    """
    family = networks[0].family
    opened = {network.part: family.facts.networks[network.part].open(path) for network in networks}
    parts, expected = [], {}
    for network in networks:
        source = opened[network.part].source
        shapes = {name: info.shape for name, info in source.names().items()}
        known = family.facts.networks[network.part]
        key_map = family.facts.key_map(shapes) if network.part == "transformer" else known.key_map()
        prefix = _prefix(network, key_map.stripped(network.keys)) if len(networks) > 1 else ""
        parts.append(ReleasedTensors(WeightsOfFiles(source, shapes), key_map, None, prefix))
        expected |= dict(ReleasedTensors(on_meta(shapes), key_map, None, prefix))
    marks = _marks(path, opened, family)
    write_checked(out, ChainMap(*parts, marks), {**expected, **marks}, {**metadata, **PLACE_FOR_HASH})
    return []


def _prefix(network: FoundNetwork, names: Mapping[str, str]) -> str:
    name, key = next(iter(names.items()))
    return key.removesuffix(name)


def _marks(path: Path, opened: Mapping[str, OpenedWeights], family: KnownFamily) -> dict[str, Tensor]:
    if "transformer" not in opened:
        return {}
    source = opened["transformer"].source
    if source.layout == "diffusers" and path.is_dir():
        return dict(family.facts.marks(path, opened["transformer"].config))
    return {key: torch.zeros(0) for key in marks_in(entries_of(open_model_files(path)))}


def to_diffusers(path: Path, out: Path, networks: Sequence[FoundNetwork], metadata: Mapping[str, str]) -> list[str]:
    """Write a network as the folder ``out`` with weights and config, several as folders in it.  Returns what is to be told.

    UserError, before anything is written, for a network whose file in a diffusers folder holds more than this one.
    """
    family = networks[0].family
    known = family.facts.networks
    if unwritable := [known[network.part].title for network in networks if known[network.part].in_folder is None]:
        raise UserError(f"{path} holds a {unwritable[0]}, which in a diffusers folder has more to it; take it from there")
    marks = marks_in(entries_of(open_model_files(path)))
    told = [f"{', '.join(marks)} told ComfyUI of the kind of model; in diffusers the configs do"] if marks else []
    for network in networks:
        opened = known[network.part].open(path)
        is_transformer = network.part == "transformer"
        folder = out / (family.facts.folder if is_transformer else network.part) if len(networks) > 1 else out
        weights: Mapping[str, Tensor] = WeightsOfFiles(opened.source, opened.source.names())
        expected: Mapping[str, Tensor] = on_meta({name: info.shape for name, info in opened.source.names().items()})
        if known[network.part].in_folder == "released":
            weights, expected = (ReleasedTensors(each, known[network.part].key_map(), None) for each in (weights, expected))
        name = ENCODER_FILE if "encoder" in network.part else DIFFUSERS_FILE
        write_checked(folder / name, weights, expected, {"format": "pt", **metadata, **PLACE_FOR_HASH})
        config = family.facts.with_marks(marks, opened.config) if is_transformer else opened.config
        if not opened.write_config(folder, config):
            told.append(f"{folder} needs the model's config.json")
    return told
