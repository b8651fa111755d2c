"""The files of a data set: on the disk, or inside a ``.tar`` file that is never unpacked."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO


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
        if not self.member:
            return self.path.open("rb")
        with self.path.open("rb") as tar:
            tar.seek(self.offset)
            data = tar.read(self.size)
        if len(data) < self.size:
            raise OSError(None, f"the tar file ends within {self.member}")
        return io.BytesIO(data)

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)


def content_of(file: DataFile) -> str:
    """Hash of its bytes: what a file is known by, wherever it lies.  Raises OSError."""
    with file.open() as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
