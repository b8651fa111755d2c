"""Every change that checkpoints make to the disk, in one place, so that a test can let each of them fail."""

import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO


class Disk:
    """The file system.  Every method raises OSError; what has not been synced may be lost when the machine stops."""

    def make_folder(self, folder: Path) -> None:
        """The folder and those above it, synced; nothing happens if it is there."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            self.mkdir(path)
            self.sync_folder(path.parent)

    def mkdir(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        """A new file.  FileExistsError if there is one."""
        return path.open("xb", buffering=0)

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        unwritten = memoryview(content)
        while unwritten:
            unwritten = unwritten[file.write(unwritten) :]

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Make names in the folder last: files made, renamed and removed."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do this (some of networks)
                raise
        finally:
            os.close(descriptor)

    def rename(self, path: Path, name: Path) -> None:
        path.rename(name)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, folder: Path) -> None:
        folder.rmdir()

    def remove_tree(self, folder: Path) -> None:
        """The folder with all that is in it; nothing happens if it is not there."""
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                self.remove_tree(path)
            else:
                self.unlink(path)
        self.rmdir(folder)

    def free_bytes(self, folder: Path) -> int:
        """What may still be written there; ``folder`` or the nearest one above it that exists."""
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free
