"""Files of named tensors: what they hold is known from their headers, and one tensor is read without the others.

Tensors are read into memory of their own, not mapped: pages of a mapped file count as the process's memory for as long as any
tensor refers to the mapping, and a rank must stay near the size of its own share of the weights.
"""

import hashlib
import json
import math
import mmap
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from utils.errors import UserError

# https://huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON header, the tensors' bytes; all little-endian.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAPPED_LIMIT = 64 * 2**20
OWN_PAGES_BYTES = 2**18
SAMPLES, SAMPLE_BYTES = 16, 2**20
DOWNLOAD_AGAIN = "Download it again"


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile(ABC):
    """One file; ``entries`` tells the tensors in it."""

    path: Path
    entries: dict[str, TensorInfo]

    @abstractmethod
    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A CPU tensor that owns its memory: all of ``key``, or some of its rows."""

    def update(self, digest: "hashlib.blake2b") -> None:
        """Feed what tells this file from others: name, size, tensors, and samples of the bytes from the first to the last."""
        size = self.path.stat().st_size
        tensors = sorted((key, info.shape, str(info.dtype)) for key, info in self.entries.items())
        digest.update(repr((self.path.name, size, tensors)).encode())
        with self.path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file with its ``metadata``.  UserError if it is not one, or not whole."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                tensors = json.loads(file.read(length)) if LENGTH_BYTES + length <= size and length <= MAX_HEADER_BYTES else {}
            self.metadata: dict[str, str] = tensors.pop("__metadata__", {})
            self._offsets = {key: tuple(entry["data_offsets"]) for key, entry in tensors.items()}
            dtypes = {key: entry["dtype"] for key, entry in tensors.items()}
            shapes = {key: tuple(entry["shape"]) for key, entry in tensors.items()}
            ends = [stop for _, stop in self._offsets.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a .safetensors file, or its header is damaged. {DOWNLOAD_AGAIN}") from error
        if size < LENGTH_BYTES or length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a .safetensors file (size {size} bytes). {DOWNLOAD_AGAIN}")
        self._start = LENGTH_BYTES + length
        expected = self._start + max(ends, default=0)
        if size != expected:
            state = "the download is incomplete" if size < expected else "it is damaged"
            raise UserError(
                f"{path} has {size} bytes; by its header it should have {expected}{' or more' * (size < self._start)}: {state}. "
                f"{DOWNLOAD_AGAIN}"
            )
        if unreadable := sorted(set(dtypes.values()) - set(SAFETENSORS_DTYPES)):
            raise UserError(f"{path} holds weights of type {', '.join(unreadable)}; known are {', '.join(SAFETENSORS_DTYPES)}")
        self.entries = {key: TensorInfo(shapes[key], SAFETENSORS_DTYPES[dtypes[key]]) for key in tensors}

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        shape, dtype = self.entries[key]
        offset = self._start + self._offsets[key][0]
        if rows is not None:
            offset += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (rows.stop - rows.start, *shape[1:])
        tensor = own_memory(shape, dtype)
        unread = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise UserError(f"{self.path} ended while {key} was read: the file was changed during the run")
                unread = unread[count:]
        return tensor


class PickledFile(TensorFile):
    """A state dict written by ``torch.save``.  Nothing in it is run.  UserError if it holds more than tensors, or is not whole."""

    def __init__(self, path: Path):
        self.path = path
        self._mapped: dict[str, Tensor] = {}
        self._touched = 0
        self._map()
        self.entries = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in self._mapped.items()}

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        if self._touched > MAPPED_LIMIT:
            self._map()
        tensor = self._mapped[key] if rows is None else self._mapped[key][rows]
        self._touched += tensor.nbytes
        return own_memory(tensor.shape, tensor.dtype).copy_(tensor)

    def _map(self) -> None:
        """Map the file anew.  The old mapping goes, and with it the pages that were read through it."""
        self._mapped, self._touched = {}, 0
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{self.path} holds more than tensors, and a pickle can run any program when it is read, so it is refused. "
                "Use the model's .safetensors files"
            ) from error
        except (RuntimeError, EOFError) as error:
            raise UserError(
                f"{self.path} is not a whole file of torch.save in the zip format (torch 1.6 or newer). {DOWNLOAD_AGAIN}, "
                "or use the model's .safetensors files"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{self.path} is not a table of named tensors; it should be a model's state dict")
        self._mapped = state


def own_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor.

    A large one gets pages of its own, which the system has back as soon as the tensor goes.  From the heap, tensors that live only
    until they are converted would leave holes between those that stay: a quarter of the weights in size, when bf16 becomes fp32.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < OWN_PAGES_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.from_numpy(numpy.frombuffer(pages, dtype=numpy.uint8)).view(dtype).view(shape)


OPENERS: dict[str, Callable[[Path], TensorFile]] = {
    ".safetensors": SafetensorsFile,
    ".pth": PickledFile,
    ".pt": PickledFile,
    ".bin": PickledFile,
}


def open_tensor_file(path: Path) -> TensorFile:
    """Open by the name's ending.  UserError for a missing file, an unknown ending, and what the kinds of file refuse."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix not in OPENERS:
        quantised = " GGUF files are quantised; use the model's bf16, fp16 or fp8 file" if path.suffix == ".gguf" else ""
        raise UserError(f"{path} is not a file of weights; its name should end in {', '.join(OPENERS)}.{quantised}")
    try:
        return OPENERS[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
