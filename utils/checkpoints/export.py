"""Files for other programs: a LoRA, or the whole model in its released layout.

A file is written aside, read back, and compared with what the model must have, before it gets its name: an older file under that
name is replaced by a good one or not at all.  Nothing of the machine goes into it: no path, no user, no host.
"""

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePath
from typing import Literal

import torch
from torch import Tensor

from utils.checkpoints.keymap import KeyMap
from utils.checkpoints.tensor_files import LENGTH_BYTES, SafetensorsFile
from utils.checkpoints.weights import save_safetensors, verify_safetensors
from utils.errors import UserError, listed

NAMED_PROBLEMS = 5
CHUNK_BYTES = 2**22
_HASH_KEY = "modelspec.hash_sha256"
# Of the hash's length: the hash is of the tensors' bytes, which come after the header that holds it.
_HASH_PLACEHOLDER = "0x" + "0" * 64


@dataclass(frozen=True)
class LoraFormat:
    """How the keys of a family's LoRA files are spelt, so that ComfyUI and diffusers both read them whole.

    A key is ``prefix``, the module's path, ``.``, ``down`` or ``up``, ``.weight``.
    """

    prefix: str
    """What stands before the module's path (`diffusion_model.`)."""
    names: Literal["released", "diffusers"]
    """Whose paths."""
    down: str = "lora_A"
    """The matrix [rank, in]."""
    up: str = "lora_B"
    """The matrix [out, rank]."""
    separator: Literal[".", "_"] = "."
    """Between the parts of the path (kohya's names have `_`)."""
    writes_alpha: bool = False
    """Whether `.alpha` = rank is written.  Only where every reader takes it: either way each reader applies strength 1."""

    def key(self, path: str, part: str) -> str:
        return f"{self.prefix}{path.replace('.', self.separator)}.{part}"


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
            _HASH_KEY: _HASH_PLACEHOLDER,
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


def export_lora(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    expected: Mapping[str, Sequence[int]],
    key_map: KeyMap,
    fmt: LoraFormat,
    alpha: float,
    rank: int,
    dtype: torch.dtype,
    family: Mapping[str, str],
    facts: TrainingFacts,
) -> Path:
    """Write ``<folder>/<name>.safetensors`` and return its path.

    ``weights`` and ``expected`` (shapes, of the whole model) go by diffusers name: ``<module>.lora_A.weight`` [rank, in] and
    ``<module>.lora_B.weight`` [out, rank], or the same for a convolution.  ``family`` is the family's own metadata.

    Adapters of modules that the naming holds as one (q, k, v) become one of their ranks' sum.  B is multiplied by alpha / rank in
    fp32 before it is cast: readers disagree about ``.alpha``, and so all of them apply the training's strength.  Raises UserError,
    and leaves no file, if a weight is missing, misshapen or not finite, or the disk is full.
    """
    path = folder / f"{name}.safetensors"
    _compare_names(path, weights, expected)
    training = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "flowstage.strength_in_weights": f"{alpha:g}/{rank}",
    }
    described = {**family, "modelspec.architecture": f"{family['modelspec.architecture']}/lora"}
    build = partial(_lora_tensors, key_map=key_map, fmt=fmt, scale=alpha / rank, rank=rank, dtype=dtype)
    _write_checked(path, build(weights), build(_on_meta(expected)), {**described, **facts.metadata(name), **training})
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
    more than one released tensor is held at a time.  ``dtype`` None: each weight's own.  Errors as :func:`export_lora`.

    ``prefix`` stands before the released names.  ``companions`` are written as they are: what the release has in the same file.
    """
    path = folder / f"{name}.safetensors"
    _compare_names(path, weights, expected)
    build = partial(ReleasedTensors, key_map=key_map, dtype=dtype, prefix=prefix)
    beside = companions or {}
    told = _on_meta({key: tensor.shape for key, tensor in beside.items()})
    tensors, wanted = ChainMap(build(weights), beside), ChainMap(build(_on_meta(expected)), told)
    _write_checked(path, tensors, wanted, {**family, **facts.metadata(name)})
    return path


def _lora_tensors(
    weights: Mapping[str, Tensor], key_map: KeyMap, fmt: LoraFormat, scale: float, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The file's tensors: one adapter for each module of the naming, which may hold those of several modules of diffusers."""
    adapters: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for module in dict.fromkeys(name.rpartition(".lora_")[0] for name in weights):
        down, up = (weights[f"{module}.lora_{side}.weight"].detach() for side in "AB")
        if down.shape[0] != rank or up.shape[1] != rank:
            raise UserError(f"the adapter of {module} has matrices {list(down.shape)} and {list(up.shape)}, but rank {rank}")
        owner = key_map.released_name(f"{module}.weight").removesuffix(".weight") if fmt.names == "released" else module
        adapters.setdefault(owner, {})[module] = down, up.float() * scale
    tensors = {}
    for path, parts in adapters.items():
        down, up = _released_adapter(path, parts, key_map) if fmt.names == "released" else parts[path]
        tensors[fmt.key(path, f"{fmt.down}.weight")] = down.to(dtype)
        tensors[fmt.key(path, f"{fmt.up}.weight")] = up.to(dtype)
        if fmt.writes_alpha:
            tensors[fmt.key(path, "alpha")] = torch.tensor(float(len(down)))
    return tensors


def _released_adapter(path: str, parts: Mapping[str, tuple[Tensor, Tensor]], key_map: KeyMap) -> tuple[Tensor, Tensor]:
    """One adapter for the released module ``path``, from those of the diffusers modules that it is made of.

    The matrices A are put one below the other, the matrices B make a block-diagonal one: n adapters of rank r become one of rank
    n r that computes the same.  A module without an adapter has zero rows in B.  What moves rows of the weight moves those of B.
    """
    names = [name.removesuffix(".weight") for name in key_map.diffusers_names(f"{path}.weight", "released")]
    present = [name for name in names if name in parts]
    total = sum(len(parts[name][0]) for name in present)
    ups, start = {}, 0
    for name in names:
        down, up = parts.get(name) or (None, _zero_rows(name, present[0], parts[present[0]][1], key_map))
        width = 0 if down is None else len(down)
        wide = up.new_zeros(len(up), total, *up.shape[2:])
        wide[:, start : start + width] = up[:, :width]
        ups[f"{name}.weight"], start = wide, start + width
    [(_, fused)] = key_map.to_released(ups).items()
    return torch.cat([parts[name][0] for name in present]), fused


def _zero_rows(module: str, other: str, up: Tensor, key_map: KeyMap) -> Tensor:
    """B of a module without an adapter, given that of ``other``, which the release holds in the same tensor."""
    start, stop, _ = key_map.sources_of(f"{module}.weight", "released").share
    other_start, other_stop, _ = key_map.sources_of(f"{other}.weight", "released").share
    return up.new_zeros(len(up) * (stop - start) // (other_stop - other_start), *up.shape[1:])


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


def _on_meta(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}


def _refuse(heading: str, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - NAMED_PROBLEMS} more"] if len(problems) > NAMED_PROBLEMS else []
        raise UserError(listed([*problems[:NAMED_PROBLEMS], *more], heading))


def _compare_names(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    given = set(weights)  # a mapping that reads from the disk would read to answer `in`
    missing = [f"{name} is missing" for name in expected if name not in given]
    unknown = [f"{name} is not a weight of the model" for name in weights if name not in expected]
    empty = [f"{name} has the shape {list(shape)}, which holds no values" for name, shape in expected.items() if 0 in shape]
    _refuse(f"{path} was not exported:", missing + unknown + empty + ([] if expected else ["there are no weights"]))


def _write_checked(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    def check(aside: Path) -> None:
        _refuse(f"{path} was not exported; a file that was there is unchanged:", _differences(aside, expected))
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


# How the module's path is spelt in LoRA files: what stands before it, and what between its parts.
_PATH_SPELLINGS = (
    ("diffusion_model.", "."),
    ("transformer.", "."),
    ("base_model.model.", "."),
    ("", "."),
    ("lora_unet_", "_"),
    ("lora_transformer_", "_"),
    ("lycoris_", "_"),
)
_ENDINGS = {
    **dict.fromkeys((".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora.down.weight"), "lora_A.weight"),
    **dict.fromkeys((".lora_B.weight", ".lora_up.weight", ".lora_B.default.weight", ".lora.up.weight"), "lora_B.weight"),
    ".alpha": "alpha",
}
_MATRICES = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that was read."""

    weights: dict[str, Tensor]
    """By diffusers name, ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``, unscaled."""
    scales: dict[str, float]
    """By module: what B A is multiplied by: ``.alpha`` / rank, or 1 without ``.alpha``."""
    metadata: dict[str, str]


def load_lora(path: Path, modules: Iterable[str], key_map: KeyMap) -> LoraFile:
    """Read a LoRA file of this project or of another trainer, in any of the usual spellings.

    ``modules``: diffusers paths of the model's modules that can have an adapter.  An adapter of a fused module is given to each of
    its parts; one that was put together from adapters of the parts is taken apart, so that each has its own rank again.  Raises
    UserError for a file that is not whole, for a key that belongs to no module, for half an adapter or two of one module, and for
    matrices that do not fit together.
    """
    try:
        file = SafetensorsFile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    owners = _owners_by_spelling(modules, key_map)
    adapters: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key in file.entries:
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), "")
        spelling = key.removesuffix(ending)
        if ending and spelling in owners:
            adapters.setdefault(spelling, {})[_ENDINGS[ending]] = file.read(key)
        else:
            problems.append(f"{key} belongs to no module of the model")
    problems += [
        problem for spelling, adapter in adapters.items() if (problem := _adapter_problem(", ".join(owners[spelling]), adapter))
    ]
    if repeated := _repeated(module for spelling in adapters for module in owners[spelling]):
        problems.append(f"{repeated[0]} has more than one adapter")
    _refuse(f"{path} is not a LoRA of this model:", problems or ([] if adapters else ["it holds no adapter"]))
    weights: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for spelling, adapter in adapters.items():
        down, up = (adapter[part] for part in _MATRICES)
        scale = float(adapter["alpha"]) / len(down) if "alpha" in adapter else 1.0
        ups = {module: rows_of(up) for module, rows_of in owners[spelling].items()}
        for module, own in zip(ups, _own_columns(list(ups.values())), strict=True):
            if own is not None:
                weights[f"{module}.lora_A.weight"], weights[f"{module}.lora_B.weight"] = down[own], ups[module][:, own]
                scales[module] = scale
    return LoraFile(weights, scales, file.metadata)


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]


def _own_columns(ups: Sequence[Tensor]) -> list[slice | None]:
    """Which columns of B belong to each of the modules that share an adapter, given each module's rows of B.

    If B is block-diagonal, so that it was put together from adapters of one rank, each module has its own again, or None if it
    has only zeros; else each module has all of the rank.
    """
    rank = ups[0].shape[1]
    everything: list[slice | None] = [slice(0, rank)] * len(ups)
    used = [up.movedim(1, 0).flatten(1).any(dim=1) for up in ups]
    count = sum(bool(columns.any()) for columns in used)
    if count == 0 or rank % count:
        return everything
    blocks: list[slice | None] = []
    own, start = rank // count, 0
    for columns in used:
        if not columns.any():
            blocks.append(None)
            continue
        if columns[:start].any() or columns[start + own :].any():
            return everything
        blocks.append(slice(start, start + own))
        start += own
    return blocks


def _owners_by_spelling(modules: Iterable[str], key_map: KeyMap) -> dict[str, dict[str, Callable[[Tensor], Tensor]]]:
    """For each spelling of a path the modules that it means, and which rows of B are theirs (several share a fused one)."""
    released: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    diffusers: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    sources = {module: key_map.sources_of(f"{module}.weight", "released") for module in modules}
    # Those that share a tensor in the order of its rows.
    for module, source in sorted(sources.items(), key=lambda item: item[1].share or ()):
        for prefix, separator in _PATH_SPELLINGS:
            spelling = prefix + source.key.removesuffix(".weight").replace(".", separator)
            released.setdefault(spelling, {})[module] = source.take
            diffusers[prefix + module.replace(".", separator)] = {module: lambda tensor: tensor}
    # A spelling that both namings know is the released one: that is what other programs write.
    return {**diffusers, **released}


def _adapter_problem(module: str, adapter: Mapping[str, Tensor]) -> str | None:
    if missing := [part for part in _MATRICES if part not in adapter]:
        return f"{module} has no {missing[0]}"
    down, up = (adapter[part] for part in _MATRICES)
    if up.shape[1] != down.shape[0]:
        return f"{module} has matrices that do not fit together: {list(down.shape)} and {list(up.shape)}"
    return None
