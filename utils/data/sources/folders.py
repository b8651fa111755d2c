"""The files of folders: each looked at once, each folder entered once, however many links lead to it."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from utils.data.media.files import DataFile, printable
from utils.data.sources.listing import MEDIA, Found, Item, Listing, Problems, divided, stamp_of
from utils.data.sources.lists import METADATA, add_rows
from utils.data.sources.looks import FileMemory
from utils.data.sources.report import FOLDERS, HIDDEN
from utils.data.sources.tars import add_members

KOHYA_NAME = re.compile(r"([1-9]\d*)_(.*)", re.DOTALL)
"""``10_name``."""


@dataclass
class Folder:
    """What lies in one folder, without what begins with a point."""

    name: str
    """In the directory, with a slash at its end; empty for the directory itself."""
    path: Path
    real: str
    """Without links."""
    files: list[os.DirEntry[str]]
    folders: list[str]
    """Names of the folders in it."""
    hidden: int
    broken: dict[str, str] = field(default_factory=dict)
    """Entries that are neither files nor folders, and why."""

    def found(self, entry: os.DirEntry[str]) -> Found:
        """Raises OSError."""
        return Found(DataFile(self.path / entry.name), f"{self.real}/{entry.name}", stamp_of(entry.stat()))


def walk(top: Path, recursive: bool) -> Iterator[Folder | tuple[str, OSError]]:
    """The folder, and with ``recursive`` those below it; (name, error) for one that cannot be read.

    Folders that links lead to come last.  One that was there already is not entered again, but named in ``broken`` of where it is.
    """
    ordinary: list[str] = [""]
    links: list[str] = []
    entered: set[tuple[int, int]] = set()
    while ordinary or links:
        name = ordinary.pop() if ordinary else links.pop(0)
        path = top / name
        try:
            state = path.stat()
            if (state.st_dev, state.st_ino) in entered:
                yield Folder(name, path, "", [], [], 0, {name: "a link to a folder whose files are taken already"})
                continue
            entered.add((state.st_dev, state.st_ino))
            folder, linked = _read(name, path)
        except OSError as error:
            yield name, error
            continue
        yield folder
        if recursive:
            names = [f"{name}{child}/" for child in folder.folders]
            ordinary += [child for child in reversed(names) if child not in linked]
            links += [child for child in names if child in linked]


def _read(name: str, path: Path) -> tuple[Folder, set[str]]:
    """The folder, and the names of the folders in it that are links."""
    folder = Folder(name, path, str(path.resolve()), [], [], 0)
    linked = set()
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):  # macOS leaves a "._clip.mp4" beside every clip on foreign disks
                folder.hidden += 1
                continue
            try:
                if entry.is_file():
                    folder.files.append(entry)
                elif entry.is_dir():
                    folder.folders.append(entry.name)
                    if entry.is_symlink():
                        linked.add(f"{name}{entry.name}/")
                else:
                    entry.stat()  # raises for a link to nothing
                    folder.broken[name + entry.name] = "it cannot be read (it is no file, but a folder, a pipe or a device)"
            except OSError as error:
                folder.broken[name + entry.name] = f"it cannot be read ({error.strerror})"
    return folder, linked


def list_folder(path: Path, recursive: bool, kohya: bool, encoding: str, memory: FileMemory, problems: Problems) -> Listing:
    """The files of a folder; of tar files in it their members.  ``encoding``: of lists without a mark."""
    listing = Listing("folder", nested=recursive or kohya)
    named = 0
    lists: list[tuple[Path, str]] = []
    for folder in walk(path, recursive or kohya):
        if isinstance(folder, tuple):
            _refuse(path, *folder, problems)
            continue
        repeats, caption = Fraction(1), None
        if kohya:
            match = KOHYA_NAME.fullmatch(folder.name.partition("/")[0])
            depth = folder.name.count("/")
            if depth == 0:
                outside = "it lies outside of the folders called <repeats>_<text>, which kohya_folder_names = true asks for"
                listing.unused |= {entry.name: outside for entry in folder.files if divided(entry.name)[1] in MEDIA}
                listing.ignored.update(suffix for entry in folder.files if (suffix := divided(entry.name)[1]) not in MEDIA)
                listing.ignored[HIDDEN] += folder.hidden
                continue
            if match is None or (depth > 1 and not recursive):
                listing.ignored[FOLDERS] += 1
                if match is None and depth == 1 and folder.files:
                    listing.unused[folder.name] = "it is not called <repeats>_<text>, and kohya_folder_names = true takes no others"
                continue
            named += 1
            repeats, caption = Fraction(int(match[1])), match[2].strip()
        first = len(listing.items)
        metadata = next((name for name in METADATA if any(entry.name == name for entry in folder.files)), None)
        if metadata:
            lists.append((folder.path / metadata, folder.name))
            folder.files = [entry for entry in folder.files if entry.name != metadata]
        _add_files(folder, listing, memory, problems)
        for item in listing.items[first:]:
            item.repeats, item.folder_caption = repeats, caption
        if not recursive and not kohya:
            listing.ignored[FOLDERS] += len(folder.folders)
    for file, prefix in lists:
        add_rows(file, prefix, listing, encoding, problems)
    if kohya and not named and not problems.whole:
        problems.whole.append(
            f"[[directory]] path = {str(path)!r}: kohya_folder_names = true, and no folder in it is called <repeats>_<text>, like "
            "10_cat; name the folder above such folders, or remove the key"
        )
    return listing


def _add_files(folder: Folder, listing: Listing, memory: FileMemory, problems: Problems) -> None:
    listing.ignored[HIDDEN] += folder.hidden
    for name, reason in folder.broken.items():
        if divided(name)[1] in MEDIA:
            problems.add(name, folder.path / name.removeprefix(folder.name), reason)
            listing.set_aside.add(divided(name)[0])
        else:
            listing.unused[name] = reason
    for entry in folder.files:
        name = folder.name + entry.name
        stem, suffix = divided(name)
        if suffix not in MEDIA and suffix != ".tar":
            listing.other(name, stem, suffix, entry.path)
            continue
        try:
            found = folder.found(entry)
        except OSError as error:  # it has vanished since the folder was read
            problems.add(name, entry.path, f"it cannot be read ({error.strerror})")
            listing.set_aside.add(stem)
            continue
        if suffix in MEDIA:
            listing.items.append(Item(printable(name), found, stem))
        else:
            add_members(found, f"{name}/", listing, memory, problems)


def _refuse(top: Path, name: str, error: OSError, problems: Problems) -> None:
    if name:
        problems.add(name, top / name, f"the folder cannot be read ({error.strerror})")
    else:
        where = f"[[directory]] path = {printable(str(top))!r}"
        problems.whole.append(f"{where}: the folder cannot be read ({error.strerror}); correct the path")
