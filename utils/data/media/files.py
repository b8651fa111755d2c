"""The files of a data set: on the disk, or inside a ``.tar`` file that is never unpacked."""

import hashlib
import io
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from utils.data.media.signatures import HEAD, MediaKind, Signature, promised_size, signature_of
from utils.errors import UserError

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(name: str) -> str:
    """A file's name on one line that UTF-8 can hold: line ends and bytes that are no text are written as codes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


@dataclass(frozen=True, slots=True, order=True)
class DataFile:
    """A file that can be opened for reading, by whichever rank and as often as needed."""

    path: Path
    """Where it is on the disk; for a member of a tar file, the tar file."""
    member: str = ""
    """Its name in the tar file."""
    offset: int = 0
    """Where its bytes begin in the tar file."""
    size: int = 0
    """How many they are.  For a file on the disk neither is used."""

    @property
    def name(self) -> str:
        """The last part of its name, with the suffix."""
        return PurePosixPath(self.member).name if self.member else self.path.name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """In small letters, with the point."""
        return PurePosixPath(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """The bytes, from their start, seekable.  Raises OSError."""
        if not stat.S_ISREG(self.path.stat().st_mode):  # a named pipe would be waited for without end
            raise OSError(None, "it is no file, but a folder, a pipe or a device")
        return io.BufferedReader(_Member(self)) if self.member else self.path.open("rb")

    def __reduce__(self) -> tuple[object, ...]:
        return _pickled, (str(self.path), self.member, self.offset, self.size)  # several times faster, for 100 000 of them

    def __str__(self) -> str:
        return printable(f"{self.path}:{self.member}" if self.member else str(self.path))


def _pickled(path: str, member: str, offset: int, size: int) -> DataFile:
    return DataFile(Path(path), member, offset, size)


def content_of(file: DataFile) -> str:
    """Hash of its bytes: what a file is known by, wherever it lies.  Raises OSError."""
    with file.open() as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


class _Member(io.RawIOBase):
    """The part of a tar file that is one member, read as it is asked for: a long clip is never in memory as a whole."""

    def __init__(self, file: DataFile):
        self.name = file.member  # PyAV tells ffmpeg, which it helps to know the format
        self._tar = file.path.open("rb")
        if os.fstat(self._tar.fileno()).st_size < file.offset + file.size:
            self._tar.close()
            raise OSError(None, f"the tar file ends within {file.member}")
        self._start, self._size, self._place = file.offset, file.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if place < 0:
            raise ValueError(f"negative place {place} in {self.name}")
        self._place = place
        return place

    def readinto(self, buffer: memoryview) -> int:
        self._tar.seek(self._start + self._place)
        read = self._tar.readinto(memoryview(buffer)[: max(0, self._size - self._place)])
        self._place += read
        return read

    def close(self) -> None:
        if hasattr(self, "_tar"):
            self._tar.close()
        super().close()


class MediaError(UserError):
    """A file that cannot be used, and why."""

    def __init__(self, file: DataFile, reason: str):
        super().__init__(file, reason)  # both arguments, so that the error survives pickling
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@lru_cache(maxsize=4096)
def tell_once(log: logging.Logger, text: str) -> None:
    """Warn of something that each reading of a file meets again."""
    log.warning(text)


@contextmanager
def opened(file: DataFile, kind: MediaKind) -> Iterator[tuple[BinaryIO, Signature | None]]:
    """The file's bytes, and what they are if that is known.  Raises MediaError if it is empty, unreadable, or not of the kind."""
    try:
        with file.open() as stream:
            head = stream.read(HEAD)
            if not head:
                raise MediaError(file, "the file is empty")
            signature = signature_of(head)
            if signature and signature.kind is None:
                raise MediaError(file, f"it is {signature.text}, and no picture or clip; {signature.advice}")
            if signature and signature.kind != kind:
                renamed = f"{file.stem}{signature.advice}"
                raise MediaError(file, f"it is {signature.text}, which its name does not say; rename it to {renamed}")
            if (promised := promised_size(head)) and promised > (size := stream.seek(0, io.SEEK_END)):
                raise MediaError(file, f"it is cut off: it says that it has {promised:,} bytes, and {size:,} are there")
            stream.seek(0)
            yield stream, signature
    except OSError as error:
        raise MediaError(file, f"it cannot be read ({error.strerror or error})") from error
