"""A family's networks: how each is recognised, opened and made into a module.  Only headers are read here."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError, listed
from utils.weights.keymap import KeyMap, Layout
from utils.weights.named import WeightSource, check_names
from utils.weights.tensor_files import OPENERS, TensorInfo, open_tensor_file

Names = Mapping[str, TensorInfo]
Config = dict[str, Any]

KNOWN_BY_SIGHT = {
    "vace_blocks.": "Wan VACE",
    "vace_patch_embedding.": "Wan VACE",
    "pose_patch_embedding.": "Wan Animate",
    "casual_audio_encoder.": "Wan S2V",
    "control_adapter.": "Wan Fun with camera control",
    "ref_conv.": "Wan Fun",
    "head.modulation": "Wan",
    "condition_embedder.time_embedder.": "Wan",
    "double_stream_modulation_img.": "FLUX.2",
    "double_blocks.": "FLUX or HunyuanVideo",
    "single_transformer_blocks.": "FLUX",
    "joint_blocks.": "Stable Diffusion 3",
    "pos_embed.proj.": "Stable Diffusion 3",
    "txt_norm.": "Qwen-Image",
    "input_blocks.9.": "Stable Diffusion 1 or 2, or SDXL's refiner",
    "down_blocks.3.": "Stable Diffusion 1 or 2, or SDXL's refiner",
    "input_blocks.": "SDXL",
    "down_blocks.": "SDXL",
}
"""Names that tell whose transformer a file holds, for the message when it is not the one that was asked for."""
TYPES = {
    "Wan": "wan",
    "FLUX.2": "flux2",
    "FLUX or HunyuanVideo": "flux",
    "FLUX": "flux",
    "Stable Diffusion 3": "sd3",
    "Qwen-Image": "qwen_image",
    "SDXL": "sdxl",
}
"""The ``[model] type`` that trains what was recognised."""


@dataclass(frozen=True)
class Network:
    """How one kind of network is read."""

    title: str
    key_map: Callable[[], KeyMap]
    kinds: tuple[str, ...]
    """What ``_class_name`` or ``model_type`` says in a ``config.json`` that belongs to it."""
    config: Callable[[Names, Config | None], Config]
    """(tensors by diffusers name, config.json) -> arguments for ``build``.  KeyError if the tensors are not of such a network."""
    build: Callable[[Config], nn.Module]
    width: Callable[[Config], int] | None = None
    """The size that must agree with the transformer's, if one must."""
    source: type[WeightSource] = WeightSource
    accept: Callable[[Config], object] = field(default=lambda config: None)
    """Raises UserError, with what was recognised, for a network of the right kind that cannot be used."""
    optional: frozenset[str] = frozenset()
    """Further names of tied weights: files hold them or not."""
    family: str | None = None
    """``[model] type``, for a transformer: files of other families are told by sight."""
    in_folder: Layout | None = "diffusers"
    """Whose names its file in a diffusers folder has; None where that file holds more than what is read of it here."""

    def open(self, path: Path) -> "OpenedNetwork":
        """See :func:`open_network`."""
        return open_network(self, path)


@dataclass(frozen=True)
class OpenedNetwork:
    """A network whose headers were read and found right; its weights are still on disk."""

    source: WeightSource
    config: Config
    build: Callable[[Config], nn.Module]

    def on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build(self.config)

    def write_config(self, folder: Path, config: Config) -> bool:
        """Write ``config.json`` as diffusers and transformers read it; False for a network that is only a part of theirs."""
        with torch.device("meta"):
            module = self.build(config)
        write = getattr(module, "save_config", None) or getattr(getattr(module, "config", None), "save_pretrained", None)
        if write:
            write(folder)
        return write is not None


def open_network(network: Network, path: Path) -> OpenedNetwork:
    """Read headers and config, and compare every name and shape with the module's.

    UserError if the file is missing, not whole, of another network, or not complete.
    """
    try:
        source = network.source(path, network.key_map())
    except UserError as error:
        if network.family and (stranger := stranger_at(path, network.family)):
            raise StrangerError(stranger) from error
        raise
    try:
        config = network.config(source.names(), _config_beside(path, network.kinds))
        network.accept(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path} is not a whole {network.title}: {error} is missing") from error
    opened = OpenedNetwork(source, config, network.build)
    expected = {name: tensor.shape for name, tensor in opened.on_meta().state_dict().items() if name not in network.optional}
    if problems := check_names(source, expected):
        raise UserError(listed(problems, f"{path} is not a whole {network.title}:"))
    return opened


class StrangerError(UserError):
    """The weights are of another family's transformer."""


def stranger_at(path: Path, family: str) -> str | None:
    """A sentence on the weights at ``path``, a file or a folder of shards, if they are known by sight to be of another family."""
    if (name := _known_at(path)) is None or TYPES.get(name) == family:
        return None
    advice = f"; that is trained with type = {TYPES[name]!r}" if name in TYPES else ""
    return f"{path} holds {name}, which type = {family!r} does not train{advice}"


def _known_at(path: Path) -> str | None:
    """What the weights at ``path`` are, if they are of a model that is known by sight."""
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in OPENERS) if path.is_dir() else [path]
        keys = [key.removeprefix("model.diffusion_model.") for file in files for key in open_tensor_file(file).entries]
    except (UserError, OSError):
        return None
    return next((name for start, name in KNOWN_BY_SIGHT.items() if any(key.startswith(start) for key in keys)), None)


def _config_beside(path: Path, kinds: tuple[str, ...]) -> Config | None:
    """``config.json`` in or beside the weights, or ``<file name>.json``, if it describes a network of these kinds."""
    candidates = [path / "config.json"] if path.is_dir() else [path.with_suffix(".json"), path.parent / "config.json"]
    for file in candidates:
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON: {error}") from error
        if isinstance(config, dict) and {config.get("_class_name"), config.get("model_type")} & set(kinds):
            return config
    return None
