"""A model's weights by diffusers name: found in whatever layout the user has, read one by one, put into a model, saved."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from utils.errors import UserError, listed
from utils.weights.keymap import KeyMap, Layout, Source
from utils.weights.scaled_fp8 import with_scales
from utils.weights.tensor_files import (
    LENGTH_BYTES,
    OPENERS,
    SAFETENSORS_DTYPES,
    SafetensorsFile,
    TensorFile,
    TensorInfo,
    open_tensor_file,
)

Shape = Sequence[int]
NAMED = 5
MODEL_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors")


class NamedWeights(Protocol):
    """Weights that are read one by one, by diffusers name."""

    def names(self) -> Mapping[str, TensorInfo]:
        """What there is, without reading it."""

    def read(self, name: str) -> Tensor:
        """One weight, on the CPU, in memory of its own."""


class WeightSource:
    """The weights of one model in a file, several files, or a folder.  Opening it reads headers only.

    A folder may hold a diffusers or released model (``diffusion_pytorch_model*.safetensors``, with an index or without), or any
    ``.safetensors`` or ``.pth`` files, of which those that hold this model are taken.  Weights stored in fp8 are given as what they
    stand for (see ``scaled_fp8.py``).

    Raises UserError for what is missing, not whole, unsafe to read, or not of this model.
    """

    layout: Layout
    files: list[Path]

    def __init__(self, path: Path | Sequence[Path], key_map: KeyMap):
        paths = [path] if isinstance(path, Path) else list(path)
        files = [file for given in paths for file in _open(given, key_map)]
        where = ", ".join(str(given) for given in paths)
        holders = _holders(files)
        names = key_map.stripped(holders)
        layout = key_map.layout_of(names)
        if layout is None:
            raise UserError(
                f"{where} does not hold weights of this model. It has {len(holders)} tensors such as {_shortened(list(holders))}; "
                f"expected are names such as {', '.join(key_map.examples('diffusers', 3))} (diffusers) "
                f"or {', '.join(key_map.examples('released', 3))} (original release)"
            )
        if problems := key_map.unknown_problems(names, layout):
            raise UserError(listed(problems, f"{where} holds tensors that this model does not have:"))
        self.layout, self.files = layout, [file.path for file in files]
        self._files = files
        self._places: dict[str, tuple[TensorFile, str, Source]] = {
            target: (holders[key], key, key_map.sources_of(target, layout))
            for name, key in names.items()
            for target in key_map.diffusers_names(name, layout)
        }
        self._names = {name: self._info(*place) for name, place in self._places.items()}

    def names(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each weight by its diffusers name."""
        return dict(self._names)

    def read(self, name: str) -> Tensor:
        """One weight as a CPU tensor that owns its memory.  UserError if the files do not hold it."""
        if name not in self._places:
            raise UserError(f"{name} is not in {', '.join(map(str, self.files))}")
        file, key, source = self._places[name]
        return source.convert(file.read(key, source.rows(file.entries[key].shape)))

    def fingerprint(self) -> str:
        """Hash that differs for other weights: of the files' names, sizes, headers and samples of the data, not of their folder."""
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(self._files, key=lambda file: file.path.name):
            file.update(digest)
        return digest.hexdigest()

    @staticmethod
    def _info(file: TensorFile, key: str, source: Source) -> TensorInfo:
        shape, dtype = file.entries[key]
        try:
            value = source.take(torch.empty(shape, dtype=dtype, device="meta"))
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error
        return TensorInfo(tuple(value.shape), value.dtype)


def _open(path: Path, key_map: KeyMap) -> list[TensorFile]:
    """The files that a path stands for, opened."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        return [_weights_in(path)]
    if named := _indexed(path, "*.safetensors.index.json") or _first_match(path, MODEL_FILES):
        return [_weights_in(file) for file in named]
    loose = sorted(path.glob("*.safetensors"))
    if not loose:
        if named := _indexed(path, "*.bin.index.json"):
            return [_weights_in(file) for file in named]
        loose = sorted(file for file in path.iterdir() if file.suffix in OPENERS)
    if not loose:
        raise UserError(f"{path} holds no weights: no file in it ends in {', '.join(OPENERS)}")
    # These names say nothing about what is inside, and a folder may hold a VAE and text encoders too.
    files = [_weights_in(file) for file in loose]
    return [file for file in files if key_map.layout_of(file.entries)] or files


def _weights_in(path: Path) -> TensorFile:
    return with_scales(open_tensor_file(path))


def _first_match(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of the first pattern that there are files for."""
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])


def _indexed(folder: Path, pattern: str) -> list[Path]:
    """The shards that the folder's index names; none without an index."""
    index = next(iter(sorted(folder.glob(pattern))), None)
    if index is None:
        return []
    try:
        shards = sorted({folder / shard for shard in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights (a JSON table with `weight_map`)") from error
    if missing := [str(shard) for shard in shards if not shard.is_file()]:
        raise UserError(listed(missing, f"{index} names files that are not there; the download is incomplete:"))
    return shards


def _holders(files: list[TensorFile]) -> dict[str, TensorFile]:
    """Which file holds each key.  UserError if two do: then it is not known which weights are meant."""
    holders: dict[str, TensorFile] = {}
    for file in files:
        if both := [key for key in file.entries if key in holders]:
            raise UserError(
                f"{holders[both[0]].path} and {file.path} hold the same weights ({_shortened(both)}); "
                "name the file that is meant, not the folder"
            )
        holders.update(dict.fromkeys(file.entries, file))
    return holders


def check_names(source: WeightSource, expected: Mapping[str, Shape]) -> list[str]:
    """What differs between the files and the model (``expected``: shapes by diffusers name); empty if nothing does."""
    found = {name: info.shape for name, info in source.names().items()}
    unexpected = [name for name in found if name not in expected]
    problems = _lacking(found, expected)
    if unexpected:
        problems.append(f"{_weights(unexpected)} not part of the model: {_shortened(unexpected)}")
    return problems


def _lacking(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    missing = [name for name in expected if name not in found]
    misshapen = [
        f"{name} is {list(found[name])}, the model's {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = []
    if missing:
        problems.append(f"{_weights(missing)} missing: {_shortened(missing)}")
    if misshapen:
        problems.append(f"{_weights(misshapen)} of another shape: {_shortened(misshapen)}")
    return problems


def _weights(names: list[str]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def canonical_name(name: str) -> str:
    """A parameter's diffusers name, without what PEFT puts in (``default`` is its name for the one adapter).

    ``x.base_layer.weight`` -> ``x.weight``; ``x.lora_A.default.weight`` -> ``x.lora_A.weight``; ``x.hada_w1_a.default`` ->
    ``x.hada_w1_a``.
    """
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "default"))


def materialise(
    module: nn.Module,
    names: Iterable[str],
    source: NamedWeights | Mapping[str, Tensor],
    *,
    device: torch.device | str,
    name_of: Callable[[str], str] = canonical_name,
) -> list[str]:
    """Give the meta parameters and buffers with these canonical names their values, on ``device`` and in their own dtype.

    ``name_of`` turns a name in ``module`` into the canonical one.  Parameter objects stay the same objects, with their
    ``requires_grad`` and attributes: whoever refers to one already sees its values.  What is no longer on meta is left alone.

    Returns the canonical names that are still on meta (see :func:`left_on_meta`).  Raises UserError, before anything is filled, if
    the source lacks a name or holds it in another shape; ValueError for a name that the module does not have.
    """
    wanted = set(names)
    tensors = [(name_of(name), tensor) for name, tensor in _persistent(module) if name_of(name) in wanted]
    if strange := sorted(wanted - {name for name, _ in tensors}):
        raise ValueError(f"the module has no {_shortened(strange)}")
    found = source if isinstance(source, Mapping) else source.names()
    held = wanted & set(found)  # a mapping that reads when asked would read to answer `in`
    if problems := _lacking({name: found[name].shape for name in held}, {name: tensor.shape for name, tensor in tensors}):
        raise UserError(listed(problems, "the weights do not fit the model:"))
    for name, tensor in tensors:
        if tensor.is_meta:  # tied weights come twice
            value = source[name].detach().clone() if isinstance(source, Mapping) else source.read(name)
            _fill(tensor, value.to(device=device, dtype=tensor.dtype))
    return left_on_meta(module, name_of=name_of)


def left_on_meta(module: nn.Module, *, name_of: Callable[[str], str] = canonical_name) -> list[str]:
    """Canonical names of the parameters and persistent buffers that have no values yet."""
    return [name_of(name) for name, tensor in _persistent(module) if tensor.is_meta]


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that belong to the state dict, with all names of tied ones."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        buffers = {name: buffer for name, buffer in part._buffers.items() if name not in part._non_persistent_buffers_set}
        for name, tensor in {**part._parameters, **buffers}.items():
            if tensor is not None:
                yield f"{prefix}.{name}".removeprefix("."), tensor


def _fill(tensor: Tensor, value: Tensor) -> None:
    """Let the object ``tensor`` hold ``value``.  (``tensor.data = value`` is not allowed from meta to another device.)"""
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    value.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, value)


def save_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a file that is there whole or not at all: aside, synced, seen by ``check`` (if it raises, nothing is left), renamed.

    Tensors may lie on any device and in any strides: they are brought to the host one after the other.  A mapping that makes its
    tensors when asked is asked twice for each.  Raises OSError, e.g. for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(aside, tensors, metadata or {})
        if check is not None:
            check(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    names, header = safetensors_header(tensors, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            file.write(bytes_of(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """The tensors' names in the order in which their bytes follow, one after the other, and all that stands before the first.

    Raises ValueError for a dtype that the format does not have.
    """
    dtype_names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if strange := [name for name, info in infos.items() if info.dtype not in dtype_names]:
        raise ValueError(f"{_shortened(strange)}: {infos[strange[0]].dtype} cannot be written to a .safetensors file")
    # The widest first, so that each tensor's bytes are aligned; then by name, so that equal weights make equal files.
    ordered = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in ordered:
        shape, dtype = infos[name]
        span = [offset, offset + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return ordered, len(text).to_bytes(LENGTH_BYTES, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values as a file has them, on the host."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def verify_safetensors(path: Path) -> SafetensorsFile:
    """The file, after a look at its size and header by us and by the safetensors library.  UserError if it is not whole."""
    file = SafetensorsFile(path)
    try:
        with safe_open(path, framework="pt"):
            return file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
