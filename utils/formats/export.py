"""Files for other programs: a LoRA, or the whole model in its released layout.

A file is written aside, read back, and compared with what the model must have, before it gets its name: an older file under that
name is replaced by a good one or not at all.  Nothing of the machine goes into it: no path, no user, no host.
"""

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePath

import torch
from torch import Tensor

from utils.errors import UserError
from utils.formats.adapter_files import ReadWeight, refuse
from utils.formats.adapter_format import LoraFormat
from utils.formats.adapter_writing import trained_tensors, training_metadata
from utils.weights.keymap import KeyMap
from utils.weights.named import save_safetensors, verify_safetensors
from utils.weights.tensor_files import LENGTH_BYTES, SafetensorsFile

CHUNK_BYTES = 2**22
# As long as the hash, which is of the tensors' bytes: they come after the header that holds it.
_HASH_PLACEHOLDER = "0x" + "0" * 64
PLACE_FOR_HASH = {"modelspec.hash_sha256": _HASH_PLACEHOLDER}
"""Metadata of a file whose tensors' hash is to be told."""


@dataclass(frozen=True)
class TrainingFacts:
    """What an exported file tells of its training."""

    step: int
    epoch: int
    samples: int
    learning_rate: float
    seed: int
    resolution: str | None = None
    """`832x480`: what the model was trained at."""
    datasets: Mapping[str, int] = field(default_factory=dict)
    """Number of items by directory.  Of a path only the last name is written."""

    def metadata(self, title: str) -> dict[str, str]:
        """The keys that interfaces show: ModelSpec's (github.com/Stability-AI/ModelSpec) and sd-scripts' ``ss_``."""
        counts: dict[str, int] = {}
        for directory, count in self.datasets.items():
            name = PurePath(directory).name
            counts[name] = counts.get(name, 0) + count
        known = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": title,
            "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),  # local time would tell the place
            "modelspec.resolution": self.resolution,
            **PLACE_FOR_HASH,
            "ss_output_name": title,
            "ss_steps": self.step,
            "ss_epoch": self.epoch,
            "ss_learning_rate": self.learning_rate,
            "ss_seed": self.seed,
            "ss_num_train_images": sum(counts.values()),
            "ss_dataset_dirs": json.dumps({name: {"img_count": count} for name, count in sorted(counts.items())}),
            "flowstage.samples": self.samples,
        }
        return {key: str(value) for key, value in known.items() if value is not None}


def export_adapter(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    expected: Mapping[str, Sequence[int]],
    scales: Mapping[str, float],
    key_map: KeyMap,
    fmt: LoraFormat,
    dtype: torch.dtype,
    family: Mapping[str, str],
    facts: TrainingFacts,
    base: ReadWeight | None = None,
) -> Path:
    """Write ``<folder>/<name>.safetensors`` and return its path.

    ``weights`` and ``expected`` (shapes, of the whole model) go by canonical name: ``<module>.lora_A.weight`` [rank, in] and
    ``<module>.lora_B.weight`` [out, rank], or the same for a convolution, or another kind's tensors.  ``scales``: by module, what
    the difference that they make is multiplied by; ranks and scales may differ.  ``base`` reads the model's weights by diffusers
    name, for DoRA.  ``family`` is the family's own metadata.

    LoRAs of modules that the naming holds as one (q, k, v) become one of their ranks' sum.  The scale is multiplied into a tensor
    in fp32 before the cast: readers disagree about ``.alpha``, and so all of them apply the training's strength.  Raises UserError,
    and leaves no file, if a weight is missing, misshapen or not finite, if the naming cannot hold an adapter (see ``unwritable``),
    or the disk is full.
    """
    path = folder / f"{name}.safetensors"
    _compare_names(path, weights, expected)
    described = {**family, "modelspec.architecture": f"{family['modelspec.architecture']}/lora"}
    build = partial(trained_tensors, scales=scales, key_map=key_map, fmt=fmt, dtype=dtype, base=base)
    try:
        tensors, wanted = build(weights), build(on_meta(expected))
    except ValueError as error:
        raise UserError(f"{path} was not exported: {error}") from error
    write_checked(path, tensors, wanted, {**described, **facts.metadata(name), **training_metadata(expected, scales)})
    return path


def export_full(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    expected: Mapping[str, Sequence[int]],
    key_map: KeyMap,
    dtype: torch.dtype | None,
    family: Mapping[str, str],
    facts: TrainingFacts,
    prefix: str = "",
    companions: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the whole model in its released layout to ``<folder>/<name>.safetensors`` and return the path.

    ``weights`` and ``expected`` (shapes) go by diffusers name.  ``weights`` may read each tensor when it is asked for (twice): no
    more than one released tensor is held at a time.  ``dtype`` None: each weight's own.  Errors as :func:`export_adapter`.

    ``prefix`` stands before the released names.  ``companions`` are written as they are: what the release has in the same file.
    """
    path = folder / f"{name}.safetensors"
    _compare_names(path, weights, expected)
    build = partial(ReleasedTensors, key_map=key_map, dtype=dtype, prefix=prefix)
    beside = companions or {}
    told = on_meta({key: tensor.shape for key, tensor in beside.items()})
    tensors, wanted = ChainMap(build(weights), beside), ChainMap(build(on_meta(expected)), told)
    write_checked(path, tensors, wanted, {**family, **facts.metadata(name)})
    return path


class ReleasedTensors(Mapping[str, Tensor]):
    """A network's weights by ``prefix`` and released name, each made when it is asked for.  ``dtype`` None: each weight's own."""

    def __init__(self, weights: Mapping[str, Tensor], key_map: KeyMap, dtype: torch.dtype | None, prefix: str = ""):
        self._weights, self._key_map, self._dtype = weights, key_map, dtype
        self._parts: dict[str, list[str]] = {}
        for name in weights:
            if key_map.diffusers_names(name, "diffusers"):  # not one that the release does without
                self._parts.setdefault(prefix + key_map.released_name(name), []).append(name)

    def __getitem__(self, key: str) -> Tensor:
        [tensor] = self._key_map.to_released({name: self._weights[name] for name in self._parts[key]}).values()
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def on_meta(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}


def _compare_names(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    given = set(weights)  # a mapping that reads from the disk would read to answer `in`
    missing = [f"{name} is missing" for name in expected if name not in given]
    unknown = [f"{name} is not a weight of the model" for name in weights if name not in expected]
    empty = [f"{name} has the shape {list(shape)}, which holds no values" for name, shape in expected.items() if 0 in shape]
    refuse(f"{path} was not exported:", missing + unknown + empty + ([] if expected else ["there are no weights"]))


def write_checked(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, read it back, compare it with ``expected`` (on meta), and put its hash where ``metadata`` has a place for it.

    Raises UserError, and leaves an older file as it is, if a tensor is missing, misshapen or not finite, or cannot be written.
    """

    def check(aside: Path) -> None:
        refuse(f"{path} was not exported; a file that was there is unchanged:", _differences(aside, expected))
        _write_hash(aside)

    try:
        save_safetensors(path, tensors, metadata, check=check)
    except OSError as error:
        raise UserError(f"{path} was not exported: {error.strerror or error}; a file that was there is unchanged") from error


def _differences(path: Path, expected: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a written file, key by key.  One tensor is read at a time."""
    try:
        file = verify_safetensors(path)
    except UserError as error:
        return [str(error)]
    return [problem for key in {**expected, **file.entries} if (problem := _difference(key, file, expected))]


def _difference(key: str, file: SafetensorsFile, expected: Mapping[str, Tensor]) -> str | None:
    if key not in file.entries or key not in expected:
        return f"{key} is {'missing' if key in expected else 'not a key of the model'}"
    shape = tuple(expected[key].shape)
    if file.entries[key].shape != shape:
        return f"{key} has the shape {list(file.entries[key].shape)}, it should have {list(shape)}"
    if 0 in shape:  # a companion that says something by being there
        return None
    # The ends show a NaN or an infinity anywhere, at a hundredth of the time of isfinite() on every value.
    if not torch.stack(torch.aminmax(file.read(key))).isfinite().all():
        return f"{key} holds values that are not finite"
    return None


def _write_hash(path: Path) -> None:
    """Put the hash of the tensors' bytes, as they are on the disk, where its placeholder stands in the header."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(LENGTH_BYTES), "little"))
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        assert header.count(_HASH_PLACEHOLDER.encode()) == 1
        file.seek(LENGTH_BYTES)
        file.write(header.replace(_HASH_PLACEHOLDER.encode(), f"0x{digest.hexdigest()}".encode()))
        file.flush()
        os.fsync(file.fileno())
