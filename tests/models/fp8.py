"""Files with fp8 weights as ComfyUI has them, made from files of a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


def is_linear(name: str, value: Tensor) -> bool:
    """The weights that are stored with a scale: of linear layers, which are most of a model, and not of tables of words."""
    return name.endswith(".weight") and value.ndim == 2 and value.is_floating_point() and not ("embed" in name or "shared" in name)


def scaled(value: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8, scale): the largest value becomes the largest of fp8, as all makers of such files do it."""
    scale = value.float().abs().max() / LARGEST
    return (value.float() / scale).to(E4M3), scale


def plain(state: State, metadata: dict[str, str]) -> State:
    """Everything rounded, norms and biases too, as in ``t5xxl_fp8_e4m3fn.safetensors``."""
    return {name: value.to(E4M3) if value.is_floating_point() and value.ndim else value for name, value in state.items()}


def with_marker(state: State, metadata: dict[str, str]) -> State:
    """The older form: a marker, and a scale for each weight and its input."""
    prefix = "model.diffusion_model." if any(name.startswith("model.diffusion_model.") for name in state) else ""
    stored = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=E4M3)}
    for name, value in state.items():
        stored[name] = value
        if is_linear(name, value):
            layer = name.removesuffix(".weight")
            stored[name], stored[f"{layer}.scale_weight"] = scaled(value)
            stored[f"{layer}.scale_input"] = torch.tensor(0.5)
    return stored


def with_formats(state: State, metadata: dict[str, str]) -> State:
    """The newer form: a scale, and a tensor that names the format, for each weight."""
    stored = {}
    for name, value in state.items():
        stored[name] = value
        if is_linear(name, value):
            layer = name.removesuffix(".weight")
            stored[name], stored[f"{layer}.weight_scale"] = scaled(value)
            told = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(told.encode()), dtype=torch.uint8)
    return stored


def with_metadata(state: State, metadata: dict[str, str]) -> State:
    """The newer form with the formats in the file's metadata."""
    stored = with_formats(state, metadata)
    layers = [name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")]
    told = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    metadata["_quantization_metadata"] = json.dumps(told)
    return {name: value for name, value in stored.items() if not name.endswith(".comfy_quant")}


FORMS: dict[str, Callable[[State, dict[str, str]], State]] = {
    "plain": plain,
    "marker": with_marker,
    "formats": with_formats,
    "metadata": with_metadata,
}


def meant(stored: State) -> State:
    """What a stored state stands for: fp8 times its scale in fp32."""
    values = {}
    for name, value in stored.items():
        layer = name.removesuffix(".weight")
        scale = stored.get(f"{layer}.scale_weight", stored.get(f"{layer}.weight_scale")) if name.endswith(".weight") else None
        if not name.endswith(("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".comfy_quant")):
            values[name] = value.float() * scale if scale is not None else value.float() if value.dtype is E4M3 else value
    return values


def rewrite(file: Path, form: str, reference: Path) -> int:
    """Store ``file`` in fp8, and in the file ``reference`` what that stands for.  Returns the number of fp8 weights."""
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    state = FORMS[form](load_file(file), metadata)
    state = {name: value.clone() for name, value in state.items()}
    save_file(state, file, metadata)
    save_file({name: value.contiguous() for name, value in meant(state).items()}, reference)
    return sum(value.dtype is E4M3 and value.ndim == 2 for value in state.values())
