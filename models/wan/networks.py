"""Wan's four networks: how each is recognised, opened and made into a module."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.wan.encoder_keys import clip_key_map, t5_key_map, vae_key_map
from models.wan.keys import wan_key_map
from models.wan.sizes import Config, Names, clip_config, t5_config, transformer_config, vae_config
from utils.checkpoints.keymap import KeyMap
from utils.checkpoints.tensor_files import OPENERS, TensorInfo, open_tensor_file
from utils.checkpoints.weights import WeightSource, check_names
from utils.errors import UserError, listed

RELATIVES = {
    "vace_blocks.": "Wan VACE",
    "vace_patch_embedding.": "Wan VACE",
    "pose_patch_embedding.": "Wan Animate",
    "casual_audio_encoder.": "Wan S2V",
    "control_adapter.": "Wan Fun with camera control",
    "ref_conv.": "Wan Fun",
    "double_blocks.": "FLUX or HunyuanVideo",
    "single_transformer_blocks.": "FLUX",
    "joint_blocks.": "Stable Diffusion 3",
    "txt_norm.": "Qwen-Image",
    "input_blocks.": "SDXL",
    "down_blocks.": "SDXL",
}
"""Names that tell what a file holds that is not a transformer of ours, for the message."""

UNSUPPORTED = {
    (36, 16, True, True): "Wan 2.1 first and last frame to video (flf2v)",
    (36, 16, False, False): "Wan 2.2 I2V-A14B",
    (48, 48, False, False): "Wan 2.2 TI2V-5B",
    (48, 16, True, False): "Wan Fun Control",
}
SUPPORTED = {(16, 16, False, False): "wan-t2v", (36, 16, True, False): "wan-i2v"}
"""Variants by (channels in, channels out, with CLIP branch, with position embedding of the CLIP branch)."""


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
    width: Callable[[Config], int]
    """The size that must agree with the transformer's."""
    source: type[WeightSource] = WeightSource


@dataclass(frozen=True)
class OpenedNetwork:
    """A network whose headers were read and found right; its weights are still on disk."""

    source: WeightSource
    config: Config
    build: Callable[[Config], nn.Module]

    def on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build(self.config)


def open_network(part: str, path: Path) -> OpenedNetwork:
    """Read headers and config, and compare every name and shape with the module's.

    UserError if the file is missing, not whole, of another network, or not complete.
    """
    network = NETWORKS[part]
    try:
        source = network.source(path, network.key_map())
    except UserError as error:
        if part == "transformer" and (relative := _relative_at(path)):
            raise UserError(f"{path} holds {relative}, which type = 'wan' does not train") from error
        raise
    try:
        config = network.config(source.names(), _config_beside(path, network.kinds))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path} is not a whole {network.title}: {error} is missing") from error
    opened = OpenedNetwork(source, config, network.build)
    expected = {name: tensor.shape for name, tensor in opened.on_meta().state_dict().items() if name != TIED}
    if problems := check_names(source, expected):
        raise UserError(listed(problems, f"{path} is not a whole {network.title}:"))
    return opened


def variant_of(config: Config) -> str:
    """``wan-t2v`` or ``wan-i2v``, by the transformer's config.  UserError, with what was recognised, for any other."""
    with_image, with_positions = config.get("image_dim") is not None, config.get("pos_embed_seq_len") is not None
    signature = (config["in_channels"], config["out_channels"], with_image, with_positions)
    if signature in SUPPORTED:
        return SUPPORTED[signature]
    what = UNSUPPORTED.get(signature, f"an unknown Wan model with {signature[0]} channels in and {signature[1]} out")
    raise UserError(f"this is {what}, which is not supported yet; supported are Wan 2.1 text to video and image to video")


def _relative_at(path: Path) -> str | None:
    """What the weights at ``path`` are, if they are of a model that is known by sight."""
    files = sorted(file for file in path.iterdir() if file.suffix in OPENERS) if path.is_dir() else [path]
    try:
        keys = [key.removeprefix("model.diffusion_model.") for file in files for key in open_tensor_file(file).entries]
    except (UserError, OSError):
        return None
    return next((name for start, name in RELATIVES.items() if any(key.startswith(start) for key in keys)), None)


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


def _build_clip(config: Config) -> CLIPVisionModel:
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    # Not a weight, so nothing would fill it when the model is made on meta.
    positions = torch.arange(model.embeddings.num_positions, device="cpu").expand(1, -1)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return model


class ClipWeights(WeightSource):
    """The release holds two of the tensors with leading dimensions of size 1; the key map takes them off when it reads."""

    SQUEEZED = ("embeddings.class_embedding", "embeddings.position_embedding.weight")

    def names(self) -> dict[str, TensorInfo]:
        names = super().names()
        for name in set(self.SQUEEZED) & set(names):
            shape = names[name].shape
            while len(shape) > 1 and shape[0] == 1:
                shape = shape[1:]
            names[name] = names[name]._replace(shape=shape)
        return names


TIED = "encoder.embed_tokens.weight"
"""Another name of UMT5's ``shared.weight``; files hold it or not."""

NETWORKS = {
    "transformer": Network(
        title="Wan transformer",
        key_map=wan_key_map,
        kinds=("WanModel", "WanTransformer3DModel"),
        config=transformer_config,
        build=WanTransformer3DModel.from_config,
        width=lambda config: config["out_channels"],
    ),
    "vae": Network(
        title="Wan 2.1 VAE",
        key_map=vae_key_map,
        kinds=("AutoencoderKLWan",),
        config=vae_config,
        build=AutoencoderKLWan.from_config,
        width=lambda config: config["z_dim"],
    ),
    "text_encoder": Network(
        title="UMT5 text encoder",
        key_map=t5_key_map,
        kinds=("umt5",),
        config=t5_config,
        build=lambda config: UMT5EncoderModel(UMT5Config(**config)),
        width=lambda config: config["d_model"],
    ),
    "image_encoder": Network(
        title="CLIP vision encoder",
        key_map=clip_key_map,
        kinds=("clip_vision_model",),
        config=clip_config,
        build=_build_clip,
        width=lambda config: config["hidden_size"],
        source=ClipWeights,
    ),
}
