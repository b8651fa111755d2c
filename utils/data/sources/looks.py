"""What is in a file: its hash, its size, its length.  Each file is opened once, and known again as long as it does not change."""

import json
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.cache.shards import write_atomically
from utils.data.media.files import content_of
from utils.data.media.pictures import read_picture
from utils.data.media.pixels import PIXELS_VERSION, MediaError, MediaInfo, is_clip, probe
from utils.data.progress import ProgressLog
from utils.data.sources.listing import Found, stamp_of
from utils.data.values import Reading
from utils.stopping import Stopped

log = logging.getLogger(__name__)

NUM_THREADS = 8
SETTLED_SECONDS = 0.02
"""A file changed so short ago could change again without another time of change, which clocks of file systems round to."""
WRITE_EVERY_SECONDS = 60.0
"""How much work on new files is lost at most by a run that is killed."""
_VERSION = [4, PIXELS_VERSION]
_BY_READING = {"clip": "", "first_frame": "\0"}
"""What is put before a file's place, as it is another thing in each reading."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a file holds."""

    content: str
    """BLAKE2b of its bytes."""
    info: MediaInfo
    alpha: bool | None = None
    """Whether parts of it are transparent; None: nobody asked."""


class Member(NamedTuple):
    """What a tar file says of one of its members, but for folders."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int
    is_plain: bool
    """Whether it is a file, and no link or the like."""


class FileMemory:
    """What is known of files, by where they are and what changes when they do, in one small file.

    Several runs may write it: each writes a whole file, with what it finds there and what it knows.  What is lost when two write at
    once is looked at again by the next.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.entries, self.tars = self._read()
        self.fresh: dict[str, list[Any]] = {}
        self.fresh_tars: dict[str, list[Any]] = {}
        self._infos: dict[tuple[Any, ...], MediaInfo] = {}

    def _read(self) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Of files, and of members of tar files; nothing if the memory is absent, broken, or of another version."""
        if self.path is None:
            return {}, {}
        try:
            memory = json.loads(self.path.read_bytes())
            return ({**memory["files"]}, {**memory["tars"]}) if memory["version"] == _VERSION else ({}, {})
        except (OSError, ValueError, KeyError, TypeError):
            return {}, {}

    def get(self, key: str, stamp: tuple[int, ...]) -> Look | None:
        entry = self.entries.get(key)
        if entry is None or entry[0] != [*stamp]:
            return None
        _, content, alpha, *shape = entry
        info = self._infos.setdefault((*shape,), MediaInfo(*shape))
        return Look(content, info, alpha)

    def put(self, key: str, stamp: tuple[int, ...], look: Look) -> None:
        info = look.info
        self.fresh[key] = [[*stamp], look.content, look.alpha, info.width, info.height, info.frames, info.fps]

    def members(self, tar: Found, read: Callable[[], list[Member]]) -> list[Member]:
        """What is in a tar file, as ``read`` finds it.  What that raises is raised."""
        known = self.tars.get(tar.identity)
        if known is not None and known[0] == [*tar.stamp]:
            return [Member(*member) for member in known[1]]
        members = read()
        self.fresh_tars[tar.identity] = [[*tar.stamp], [[*member] for member in members]]
        return members

    def write(self) -> None:
        """Raises UserError if it cannot be written."""
        if self.path is None or not (self.fresh or self.fresh_tars):
            return
        files, tars = self._read()
        self.entries, self.tars = {**files, **self.fresh}, {**tars, **self.fresh_tars}
        memory = {"version": _VERSION, "files": self.entries, "tars": self.tars}
        write_atomically(self.path, json.dumps(memory, separators=(",", ":")).encode())
        self.fresh, self.fresh_tars = {}, {}


@dataclass(slots=True)
class Wanted:
    """A file that is to be looked at."""

    found: Found
    reading: Reading
    alpha: bool = False
    """Whether it matters that parts of it are transparent."""
    key: str = ""
    """The file, and what it is taken for."""

    def __post_init__(self) -> None:
        self.key = _BY_READING[self.reading.animated] + self.found.identity


def remembered(files: Iterable[Wanted], memory: FileMemory) -> tuple[dict[str, Look], dict[str, Wanted]]:
    """What is known of the files, and those that have to be looked at, by ``Wanted.key``."""
    looks: dict[str, Look] = {}
    new: dict[str, Wanted] = {}
    for wanted in files:
        key = wanted.key
        known = looks.get(key) or memory.get(key, wanted.found.stamp)
        if known is None or (wanted.alpha and known.alpha is None):
            new[key] = wanted if key not in new or wanted.alpha else new[key]
        else:
            looks[key] = known
    return looks, new


def look_at_all(new: dict[str, Wanted], memory: FileMemory, stop: Callable[[], str]) -> dict[str, Look | MediaError]:
    """What is in each file, or why it cannot be used.

    With a reason from ``stop``, what was looked at is remembered and Stopped raised.
    """
    looks: dict[str, Look | MediaError] = {}
    progress, written, reason = ProgressLog("reading new files", len(new)), time.monotonic(), ""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        pending: dict[str, Future[Look]] = {key: pool.submit(_look, wanted) for key, wanted in new.items()}
        for number, (key, future) in enumerate(pending.items(), start=1):
            try:
                looks[key] = look = future.result()
                memory.put(key, new[key].found.stamp, look)
            except MediaError as error:
                looks[key] = error
            progress.report(number)
            if reason := stop():
                pool.shutdown(wait=True, cancel_futures=True)
                break
            if time.monotonic() - written > WRITE_EVERY_SECONDS:
                memory.write()
                written = time.monotonic()
    memory.write()
    if reason:
        raise Stopped(reason)
    return looks


def _look(wanted: Wanted) -> Look:
    """Raises MediaError."""
    file, stamp = wanted.found.file, wanted.found.stamp
    young = SETTLED_SECONDS - (time.time() - stamp[1] / 1e9)
    if 0 < young <= SETTLED_SECONDS:
        time.sleep(young)
    try:
        info = probe(file, wanted.reading)
        alpha = (not is_clip(file) and read_picture(file, colours=False).mode == "RGBA") if wanted.alpha else None
        content = content_of(file)
        now = stamp_of(file.path.stat())
    except OSError as error:
        raise MediaError(file, f"it cannot be read ({error.strerror or error})") from error
    if now != stamp[: len(now)]:
        raise MediaError(file, "it changed while it was read; start again when it is whole")
    return Look(content, info, alpha)
