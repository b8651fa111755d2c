"""A disk on which one operation fails or is the last, and that knows what a failure of the machine would leave of it."""

import errno
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from utils.checkpoints.disk import Disk

ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}


class PowerOff(BaseException):
    """The process is no more: nothing that comes after it in the program happens."""


@dataclass
class File:
    """``written`` is what the running system shows, ``synced`` what is surely on the disk."""

    written: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    """Names and what they mean, as the running system shows them and as they are surely on the disk."""

    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)


class UnsyncedDisk(Disk):
    """Takes no time to sync."""

    def sync(self, file: BinaryIO) -> None: ...

    def sync_folder(self, folder: Path) -> None: ...


class FaultyDisk(Disk):
    """Does what it is told below ``root``, and keeps account of what was synced.  Nothing is really synced: that would take long.

    ``at``: the number, from 0, of the operation at which something happens; ``what``: "stop", or a key of ERRORS; ``lasting``: each
    later operation fails too.
    """

    def __init__(self, root: Path, at: int | None = None, what: str = "stop", lasting: bool = False):
        self.root, self.at, self.what, self.lasting = root, at, what, lasting
        self.operations: list[str] = []
        self.stopped = False
        self.tree = Folder()
        self._open: dict[int, File] = {}

    # ── what happens ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, name: str, path: Path) -> None:
        """Count the operation, and let it fail if it is the one.  What it would have done is then not done."""
        if self.stopped:
            raise PowerOff
        number = len(self.operations)
        self.operations.append(f"{name} {path.relative_to(self.root)}")
        if number == self.at and self.what == "stop":
            self.stopped = True
            raise PowerOff
        if number == self.at or (self.lasting and self.at is not None and number > self.at):
            raise OSError(ERRORS[self.what], os.strerror(ERRORS[self.what]), str(path))

    def mkdir(self, folder: Path) -> None:
        self._begin("mkdir", folder)
        super().mkdir(folder)
        self._folder(folder.parent).names.setdefault(folder.name, Folder())

    def create(self, path: Path) -> BinaryIO:
        self._begin("create", path)
        file = super().create(path)
        self._open[file.fileno()] = self._folder(path.parent).names[path.name] = File()
        return file

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        try:
            self._begin("write", Path(file.name))
        except BaseException:
            self._write(file, bytes(content)[: len(content) // 2])  # as far as there was room, or time
            raise
        self._write(file, bytes(content))

    def _write(self, file: BinaryIO, content: bytes) -> None:
        super().write(file, content)
        self._open[file.fileno()].written += content

    def sync(self, file: BinaryIO) -> None:
        self._begin("sync", Path(file.name))
        self._open[file.fileno()].synced = self._open[file.fileno()].written

    def sync_folder(self, folder: Path) -> None:
        self._begin("sync folder", folder)
        found = self._folder(folder)
        found.synced = dict(found.names)

    def rename(self, path: Path, name: Path) -> None:
        self._begin("rename", path)
        super().rename(path, name)
        self._folder(name.parent).names[name.name] = self._folder(path.parent).names.pop(path.name)

    def unlink(self, path: Path) -> None:
        self._begin("unlink", path)
        super().unlink(path)
        self._folder(path.parent).names.pop(path.name)

    def rmdir(self, folder: Path) -> None:
        self._begin("rmdir", folder)
        super().rmdir(folder)
        self._folder(folder.parent).names.pop(folder.name)

    def _folder(self, path: Path) -> Folder:
        found = self.tree
        for name in path.relative_to(self.root).parts:
            found = found.names[name]
        return found

    # ── what is left after a failure of the machine ───────────────────────────────────────────────────────────────────────

    def aftermaths(self, seeds: int) -> Iterator[tuple[str, Folder]]:
        """What could be found on the disk: all of it, only what was synced, and mixtures of the two, as systems differ."""
        yield "all is there", _after(self.tree, lambda: True)
        yield "only what was synced", _after(self.tree, lambda: False)
        for seed in range(seeds):
            chance = random.Random(seed)
            yield f"mixture {seed}", _after(self.tree, lambda chance=chance: chance.random() < 0.5)


def _after(folder: Folder, is_kept) -> Folder:
    """For each name and each file's content that differs, what was written or what was synced."""
    left = Folder()
    for name in dict.fromkeys([*folder.names, *folder.synced]):
        now, before = folder.names.get(name), folder.synced.get(name)
        node = now if now is before or is_kept() else before
        if isinstance(node, Folder):
            left.names[name] = _after(node, is_kept)
        elif isinstance(node, File):
            left.names[name] = File(node.written if is_kept() else node.synced)
    return left


def lay_out(folder: Folder, place: Path) -> None:
    """Make a real folder of it."""
    place.mkdir()
    for name, node in folder.names.items():
        if isinstance(node, Folder):
            lay_out(node, place / name)
        else:
            (place / name).write_bytes(node.written)
