"""The members of a ``.tar`` file, which is read where it is and never unpacked."""

import tarfile
from pathlib import Path, PurePosixPath

from utils.data.files import DataFile, printable
from utils.data.listing import MEDIA, Found, Item, Listing, Problems, divided
from utils.data.scan_report import HIDDEN

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin."""


def add_members(tar: Found, prefix: str, listing: Listing, problems: Problems) -> None:
    """The files of one tar file; ``prefix`` is put before their names.

    Names are those of webdataset: ``0001.jpg`` and ``0001.txt`` belong together, by the name up to its last point or, where there
    is no such file, to its first.
    """
    path, name = tar.file.path, prefix.rstrip("/") or tar.file.name
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if kind := next((kind for mark, kind in COMPRESSED.items() if start.startswith(mark)), None):
                problems.whole.append(
                    f"{printable(str(path))}: it is compressed ({kind}), so no single file of it can be read; uncompress it: "
                    "what is in it is compressed already"
                )
                return
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as opened:
                members = opened.getmembers()
                end = opened.offset
            reason = _damage(stream, end, tar.stamp[0])
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        problems.add(name, path, f"it does not read as a tar file ({error}); it is cut off, damaged, or none")
        return
    if reason:
        problems.add(name, path, reason)
    latest = {member.name: member for member in members}
    for member in members:
        called = prefix + member.name.removeprefix("./")
        if member.isdir():
            continue
        if PurePosixPath(member.name).name.startswith("."):
            listing.ignored[HIDDEN] += 1
        elif latest[member.name] is not member:
            listing.unused[f"{called} at byte {member.offset_data}"] = "a later file of the same name in the tar file replaces it"
        elif not member.isreg() or member.issparse():
            listing.unused[called] = "in the tar file it is a link, or no plain file; put the file itself into it"
        elif member.offset_data + member.size > tar.stamp[0]:
            problems.add(called, f"{path}:{member.name}", "the tar file ends within it")
        else:
            file = DataFile(path, member.name, member.offset_data, member.size)
            stem, suffix = divided(called)
            if suffix in MEDIA:
                stamp = (*tar.stamp, member.offset_data, member.size)
                listing.items.append(Item(printable(called), Found(file, f"{tar.identity}:{member.name}", stamp), stem))
            else:
                listing.other(called, stem, suffix, file)
    _join_webdataset(listing, prefix)


def _join_webdataset(listing: Listing, prefix: str) -> None:
    """``0001.left.jpg`` also belongs to ``0001.txt``, if nothing is called ``0001.left.txt``."""
    for item in listing.items:
        if item.stem.startswith(prefix) and item.stem + ".txt" not in listing.texts and item.stem + ".json" not in listing.texts:
            folder, slash, last = item.stem.rpartition("/")
            short = folder + slash + last.partition(".")[0]
            if short + ".txt" in listing.texts or short + ".json" in listing.texts:
                item.stem = short


def _damage(stream, end: int, size: int) -> str | None:
    """tarfile takes a header that it cannot read for the end: whether zeros, of which a tar file's end consists, follow there."""
    stream.seek(end)
    while block := stream.read(1 << 20):
        if block.count(0) != len(block):
            place = f"byte {end} of {size}"
            return f"its files behind {place} cannot be found: it is damaged there, or several tar files were put into one"
    return None


def list_tar(path: Path, found: Found, problems: Problems) -> Listing:
    listing = Listing("tar", nested=True)
    add_members(found, "", listing, problems)
    return listing
