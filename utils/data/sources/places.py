"""Where a ``[[directory]]`` has its files: a folder, a tar file, or a list."""

from collections import Counter
from pathlib import Path

from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.media.files import DataFile, printable
from utils.data.sources.folders import list_folder
from utils.data.sources.listing import Found, Listing, Problems, stamp_of
from utils.data.sources.lists import LISTS, list_rows
from utils.data.sources.looks import FileMemory
from utils.data.sources.tars import list_tar

ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar", ".gz", ".xz", ".zst")


def list_directory(directory: DirectoryConfig, settings: DatasetConfig, memory: FileMemory, problems: Problems) -> Listing:
    """Everything that lies there; what cannot be read is one of the problems."""
    path = directory.path
    listing = _listing(path, directory, settings, memory, problems)
    # On Linux a name may be any bytes: two that are written alike on a line of text are told apart.
    if len(times := Counter(item.name for item in listing.items)) < len(listing.items):
        for item in listing.items:
            if times[item.name] > 1:
                times[item.name] -= 1
                item.name = f"{item.name}[{times[item.name] + 1}]"
    return listing


def _listing(path: Path, directory: DirectoryConfig, settings: DatasetConfig, memory: FileMemory, problems: Problems) -> Listing:
    suffix = path.suffix.lower()
    where = f"[[directory]] path = {printable(str(path))!r}"
    try:
        is_folder = path.is_dir()
        state = None if is_folder else path.stat()
    except OSError as error:
        problems.whole.append(f"{where}: it cannot be read ({error.strerror}); correct the path")
        return Listing("folder")
    for key in ("recursive", "kohya_folder_names"):
        if not is_folder and getattr(directory, key):
            problems.whole.append(f"{where}: {key} = true is for folders; remove it")
    if is_folder:
        return list_folder(path, directory.recursive, directory.kohya_folder_names, settings.caption_encoding, memory, problems)
    if suffix == ".tar":
        return list_tar(Found(DataFile(path), str(path.resolve()), stamp_of(state)), memory, problems)
    if suffix in LISTS:
        return list_rows(path, settings.caption_encoding, problems)
    advice = "name a folder, a .tar file, or a list of files that ends in .jsonl or .csv"
    if path.name.lower().endswith(ARCHIVES):
        advice = "single files of a compressed archive cannot be read; uncompress it to a .tar file, or unpack it to a folder"
    problems.whole.append(f"{where}: {advice}")
    return Listing("folder")
