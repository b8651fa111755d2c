"""Weights that a file stores in 8-bit floats, with a scale for each or without: read as the weights that they stand for.

Three forms, which ComfyUI writes and reads (its ``QUANTIZATION.md`` and ``comfy/utils.py``, ``convert_old_quants``):

- plain: ``<layer>.weight`` was rounded to fp8, and is meant as it is;
- a tensor ``scaled_fp8`` that says only that the file is of this form, and ``<layer>.scale_weight``;
- ``<layer>.weight_scale``, and the layer's format as JSON in the bytes of ``<layer>.comfy_quant``, or for all layers in the
  file's metadata under ``_quantization_metadata``.

The weight is scale x fp8.  ``scale_input`` and ``input_scale`` belong to multiplications in fp8, which training does not do.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError, listed
from utils.weights.tensor_files import TensorFile, TensorInfo, own_memory

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
MARKER = "scaled_fp8"
FORMAT = ".comfy_quant"
FORMATS_IN_METADATA = "_quantization_metadata"
OTHER_SCALES = (".weight_scale_2", ".weight_scale_inv", ".pre_quant_scale", ".absmax", ".quant_map", ".nested_absmax", ".SCB")
"""Of nvfp4, blocks of fp8, and bitsandbytes' nf4 and int8."""
WHOLE_NUMBERS = (torch.int8, torch.uint8)
ADVICE = "use the model's bf16, fp16 or fp8 file (plain, or scaled by one number a tensor or a row)"
NAMED = 3
EXACT = torch.bfloat16
"""Holds every value of both kinds of fp8."""


class Fp8File(TensorFile):
    """The weights that a file with fp8 weights stands for, without the scales and the marks.

    Plain fp8 becomes bf16, which loses nothing; with a scale the product is computed and given in fp32.
    UserError for scales that do not fit their weights.
    """

    def __init__(self, file: TensorFile):
        self.path = file.path
        self._file = file
        self._scales: dict[str, str] = {}
        wrong = []
        for key in file.entries:
            if key.endswith(WEIGHT_SCALES):
                weight = f"{key.rpartition('.')[0]}.weight"
                wrong += [problem] if (problem := _misfit(file, weight, key)) else []
                self._scales[weight] = key
        formats = _formats(file)
        wrong += [
            f"{layer}: it is fp8, and its weight_scale is missing" for layer in formats if f"{layer}.weight" not in self._scales
        ]
        if wrong:
            raise UserError(
                listed(_first(wrong), f"{file.path} holds fp8 weights that cannot be read; download it again, or {ADVICE}:")
            )
        self.entries = {key: self._as_read(key, info) for key, info in file.entries.items() if not _is_extra(key)}

    def _as_read(self, key: str, info: TensorInfo) -> TensorInfo:
        if key in self._scales:
            return info._replace(dtype=torch.float32)
        return info._replace(dtype=EXACT) if info.dtype in FP8.values() else info

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        stored, dtype = self._file.read(key, rows), self.entries[key].dtype
        if stored.dtype is dtype and key not in self._scales:
            return stored
        value = own_memory(stored.shape, dtype).copy_(stored)
        if key not in self._scales:
            return value
        scale = self._file.read(self._scales[key]).float().flatten()
        if len(scale) > 1:
            scale = scale[rows or slice(None)].view(-1, *[1] * (value.ndim - 1))
        return value.mul_(scale)

    def update(self, digest: "hashlib.blake2b") -> None:
        self._file.update(digest)


def with_scales(file: TensorFile) -> TensorFile:
    """The file, or if it stores weights in fp8, the weights that it stands for.

    UserError for weights of other quantisations (int8, nf4, nvfp4 and the like), with what to use instead.
    """
    others = {layer: form for layer, form in _formats(file).items() if form not in FP8}
    problems = [f"{layer} is quantised as {form}" for layer, form in others.items()]
    for key, info in file.entries.items():
        if key.endswith(OTHER_SCALES):
            problems.append(f"{key} belongs to a quantisation that is not read")
        elif key.endswith(".weight") and info.dtype in WHOLE_NUMBERS and key.removesuffix(".weight") not in others:
            problems.append(f"{key} is quantised to {str(info.dtype).removeprefix('torch.')}")
    if problems:
        raise UserError(listed(_first(problems), f"{file.path} is quantised in a way that cannot be trained on; {ADVICE}:"))
    is_fp8 = any(_is_extra(key) or info.dtype in FP8.values() for key, info in file.entries.items())
    return Fp8File(file) if is_fp8 else file


def _is_extra(key: str) -> bool:
    """Whether a tensor says how others are stored, and is no weight."""
    return key.endswith((*WEIGHT_SCALES, *INPUT_SCALES, FORMAT)) or key.rpartition(".")[2] == MARKER


def _misfit(file: TensorFile, weight: str, scale: str) -> str | None:
    """What is wrong with a scale; None if it can be multiplied with its weight."""
    if weight not in file.entries:
        return f"{scale}: there is no {weight} in the file"
    rows, *_ = (*file.entries[weight].shape, 1)
    shape = file.entries[scale].shape
    if shape in ((), (1,), (rows,)) or (shape[0] in (1, rows) and set(shape[1:]) == {1}):
        return None
    return f"{scale} has the shape {list(shape)}, which is neither one number nor one for each of the {rows} rows of {weight}"


def _formats(file: TensorFile) -> dict[str, str]:
    """The format of each layer for which the file tells one.  UserError for what is not such a table."""
    try:
        told: dict[str, Any] = json.loads(getattr(file, "metadata", {}).get(FORMATS_IN_METADATA, "{}")).get("layers", {})
        for key in file.entries:
            if key.endswith(FORMAT):
                told[key.removesuffix(FORMAT)] = json.loads(file.read(key).numpy().tobytes())
        return {layer: entry if isinstance(entry, str) else entry["format"] for layer, entry in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file.path} does not say how its weights are quantised in the way of ComfyUI; {ADVICE}") from error


def _first(problems: list[str]) -> list[str]:
    return problems[:NAMED] + ([f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else [])
