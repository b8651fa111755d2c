"""Shards: immutable safetensors files with an index beside each, in a folder that several processes write to without locks.

A shard is written aside, synced and renamed, and its index after it; readers believe only what has an index.  So a process that
is killed at any moment loses no more than what it had not written yet, and nobody ever sees half a file.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """A place to write to; what was written there is then synced and gets its name.  Makes the folder.

    Raises UserError if the folder cannot be written or is full; what had the name before stays.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(
            f"the cache cannot be written: {path.parent}: {error}; make room or correct the rights there, or set cache_dir to "
            "another folder; what was encoded before is kept"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole small file: it is there with all of its bytes, or as it was before.  Raises UserError if it cannot be."""
    with _written_aside(path) as aside:
        aside.write_bytes(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Place:
    """Where the tensors of one key are."""

    shard: Path
    fields: tuple[str, ...]


def tensor_name(key: str, field: str) -> str:
    """Name of a tensor in a shard."""
    return f"{key}/{field}"


class ShardFolder:
    """What the finished shards of one folder hold; others may add to it all the time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._seen: set[Path] = set()
        self._refused: set[Path] = set()

    def refresh(self) -> None:
        """Look for new shards.  One that is damaged is named in a warning, once, and passed over."""
        # In the order of their names, so that two processes agree on a key that is in two shards.
        for index in sorted(self.folder.glob("*.json")):
            if index in self._seen:
                continue
            shard = index.with_suffix(".safetensors")
            try:
                places = _read_index(index, shard)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                # Not marked as seen: on a network's disk the file may only be late.
                if index not in self._refused:
                    log.warning(
                        "%s is damaged and is not used (%s); what it held is encoded again, it can be deleted", shard, error
                    )
                    self._refused.add(index)
                continue
            self._seen.add(index)
            for key, place in places.items():
                self.places.setdefault(key, place)


def _read_index(index: Path, shard: Path) -> dict[str, Place]:
    """The places that an index names; raises if they are not all there."""
    content = json.loads(index.read_bytes())
    size = shard.stat().st_size
    if size != content["bytes"]:
        raise ValueError(f"it has {size} bytes instead of {content['bytes']}")
    places = {key: Place(shard, tuple(fields)) for key, fields in content["items"].items()}
    with safe_open(shard, "pt") as file:
        missing = {tensor_name(key, name) for key, place in places.items() for name in place.fields} - set(file.keys())
    if missing:
        raise ValueError(f"{len(missing)} of its tensors are missing")
    return places


class ShardWriter:
    """Collects items and writes a shard whenever there are enough of them, or they have waited long enough."""

    def __init__(self, folder: Path, *, max_items: int, max_bytes: int, max_seconds: float):
        self.folder, self.max_items, self.max_bytes, self.max_seconds = folder, max_items, max_bytes, max_seconds
        self._name = secrets.token_hex(6)
        self._written = 0
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._items: dict[str, list[str]] = {}
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, key: str, fields: dict[str, Tensor]) -> None:
        if not self._items:
            self._since = time.monotonic()
        self._items[key] = sorted(fields)
        for name, tensor in fields.items():
            # A copy: the tensor may be a view of a whole batch, which would be kept in memory, or share its storage with another.
            tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self._tensors[tensor_name(key, name)] = tensor
            self._bytes += tensor.nbytes
        waited = time.monotonic() - self._since
        if len(self._items) >= self.max_items or self._bytes >= self.max_bytes or waited >= self.max_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected, if anything."""
        if not self._items:
            return
        shard = self.folder / f"{self._name}-{self._written:06d}.safetensors"
        with _written_aside(shard) as aside:
            save_file(self._tensors, aside)
            size = aside.stat().st_size
        write_atomically(shard.with_suffix(".json"), json.dumps({"bytes": size, "items": self._items}).encode())
        self._written += 1
        self._clear()
