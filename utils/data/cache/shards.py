"""Shards: immutable safetensors files with an index beside each, in a folder that several processes write to without locks.

A shard is written aside, synced and renamed, and its index after it; readers believe only what has an index.  So a process that
is killed at any moment loses no more than what it had not written yet, and nobody ever sees half a file.

The index has the keys, the shard's size, and two checksums: of its header, which is looked at whenever the shard is found, and of
all of its bytes, for ``python -m utils.data.cache verify``.  When a run last used a shard is the index's time of change.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError

log = logging.getLogger(__name__)

ABOUT = "about.json"
"""What the shards of a folder were made by; no index."""
INDEX_VERSION = 2
LONGEST_WAIT = 6
"""A shard waits for its items up to so many times ``max_seconds`` in a long build, of which that is a small part."""
USED_SECONDS = 86400.0
"""How exact the time is at which a shard was last used."""


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tensors of a key are."""

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
        self._seen: set[str] = set()
        self._refused: set[str] = set()

    def refresh(self) -> None:
        """Look for new shards.  One that is damaged is named in a warning, once, and passed over."""
        # In the order of their names, so that two processes agree on a key that is in two shards.
        for name in index_names(self.folder):
            if name in self._seen:
                continue
            index = self.folder / name
            try:
                content = read_index(index)
                check_header(index, content)
            except INDEX_ERRORS as error:
                # Not marked as seen: on a network's disk the file may only be late.
                if name not in self._refused:
                    shard = index.with_suffix(".safetensors")
                    log.warning(
                        "%s is damaged and is not used (%s); what it held is encoded again, it can be deleted", shard, error
                    )
                    self._refused.add(name)
                continue
            self._seen.add(name)
            for entry in content["items"]:
                place = Place(index.with_suffix(".safetensors"), tuple(entry["fields"]))
                for key in entry["keys"]:
                    self.places.setdefault(key, place)

    def mark_used(self, keys: Iterable[str]) -> None:
        """Remember that a run uses these keys: their shards are not ``unused`` for a while."""
        now = time.time()
        used = {id(place): place for key in keys if (place := self.places.get(key))}  # there are thousands of keys in one place
        for place in used.values():
            index = place.shard.with_suffix(".json")
            with suppress(OSError):  # somebody else's files; they have been used all the same
                if now - index.stat().st_mtime > USED_SECONDS:
                    os.utime(index)


def index_names(folder: Path) -> list[str]:
    """The names of the indexes in a folder, sorted; none if there is no such folder.  UserError if it cannot be read."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"the cache cannot be read: {folder}: {error}; correct the rights there, or set cache_dir") from error
    return sorted(name for name in names if name.endswith(".json") and name != ABOUT and not name.startswith("."))


INDEX_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading an index raises if it, or its shard, is damaged."""


def read_index(index: Path) -> dict[str, Any]:
    """``bytes``, ``header`` and ``checksum`` of the shard, and ``items``: names of fields with the keys that have these."""
    content = json.loads(index.read_bytes())
    if content["version"] != INDEX_VERSION:
        raise ValueError(f"its index is of version {content['version']} instead of {INDEX_VERSION}")
    return content


def check_header(index: Path, content: dict[str, Any]) -> None:
    """Whether the shard has its size and its header.  Raises one of INDEX_ERRORS, ValueError with the reason."""
    shard = index.with_suffix(".safetensors")
    size = shard.stat().st_size
    if size != content["bytes"]:
        raise ValueError(f"it has {size} bytes instead of {content['bytes']}")
    if _header_checksum(shard) != content["header"]:
        raise ValueError("its header is not the one that was written")


def check_bytes(index: Path, content: dict[str, Any]) -> None:
    """Whether every byte of the shard is the one that was written.  Raises like :func:`check_header`."""
    check_header(index, content)
    if _checksum(index.with_suffix(".safetensors")) != content["checksum"]:
        raise ValueError("its bytes are not those that were written")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _blake2b).hexdigest()


def _header_checksum(shard: Path) -> str:
    """Of a safetensors file: the length of the header in 8 bytes, and the header."""
    with shard.open("rb") as file:
        length = file.read(8)
        return _blake2b(length + file.read(min(int.from_bytes(length, "little"), 1 << 28))).hexdigest()


def _blake2b(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.blake2b(data, digest_size=16)


class ShardWriter:
    """Collects items and writes a shard whenever there are enough of them, or they have waited long enough.

    In memory it holds ``max_bytes`` and one item at most.
    """

    def __init__(self, folder: Path, *, max_items: int, max_bytes: int, max_seconds: float):
        self.folder, self.max_items, self.max_bytes, self.max_seconds = folder, max_items, max_bytes, max_seconds
        self._name = secrets.token_hex(6)
        self._written = 0
        self._began = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._items: dict[tuple[str, ...], list[str]] = {}
        self._count = self._bytes = 0
        self._since = time.monotonic()

    def add(self, key: str, fields: dict[str, Tensor]) -> None:
        if not self._count:
            self._since = time.monotonic()
        self._count += 1
        self._items.setdefault(tuple(sorted(fields)), []).append(key)
        for name, tensor in fields.items():
            # A copy: the tensor may be a view of a whole batch, which would be kept in memory, or share its storage with another.
            tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self._tensors[tensor_name(key, name)] = tensor
            self._bytes += tensor.nbytes
        if self._count >= self.max_items or self._bytes >= self.max_bytes or self._has_waited():
            self.flush()

    def _has_waited(self) -> bool:
        """A kill loses ``max_seconds`` of work, or a twentieth of a longer build, so that this has not thousands of shards."""
        now = time.monotonic()
        patience = min(LONGEST_WAIT * self.max_seconds, max(self.max_seconds, (now - self._began) / 20))
        return now - self._since >= patience

    def flush(self) -> None:
        """Write what has been collected, if anything."""
        if not self._count:
            return
        shard = self.folder / f"{self._name}-{self._written:06d}.safetensors"
        with _written_aside(shard) as aside:
            save_file(self._tensors, aside)
            content = {
                "version": INDEX_VERSION,
                "bytes": aside.stat().st_size,
                "header": _header_checksum(aside),
                "checksum": _checksum(aside),
                "items": [{"fields": fields, "keys": keys} for fields, keys in self._items.items()],
            }
        write_atomically(shard.with_suffix(".json"), json.dumps(content).encode())
        self._written += 1
        self._clear()
