"""The members of a ``.tar`` file, which is read where it is and never unpacked."""

import tarfile
from typing import BinaryIO

from utils.data.media.files import DataFile, printable
from utils.data.sources.listing import MEDIA, Found, Item, Listing, Problems, divided
from utils.data.sources.looks import FileMemory, Member
from utils.data.sources.report import HIDDEN

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin."""


class _TarError(ValueError):
    """What is wrong with a tar file."""


def add_members(tar: Found, prefix: str, listing: Listing, memory: FileMemory, problems: Problems) -> None:
    """The files of one tar file; ``prefix`` is put before their names.

    Names are those of webdataset: ``0001.jpg`` and ``0001.txt`` belong together, by the name up to its last point or, where there
    is no such file, to its first.
    """
    path, damage = tar.file.path, ""

    def read() -> list[Member]:
        nonlocal damage
        members, damage = _read(tar)
        return members

    try:
        members = memory.members(tar, read)
    except _TarError as error:
        problems.whole.append(f"{printable(str(path))}: {error}")
        return
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        damage, members = f"it does not read as a tar file ({error}); it is cut off, damaged, or none", []
    if damage:
        memory.fresh_tars.pop(tar.identity, None)  # it is told of at every start
        problems.add(prefix.rstrip("/") or tar.file.name, path, damage)
    first = len(listing.items)
    latest = {member.name: member for member in members}
    for member in members:
        called = prefix + member.name.removeprefix("./")
        if member.name.rpartition("/")[2].startswith("."):
            listing.ignored[HIDDEN] += 1
        elif latest[member.name] is not member:
            listing.unused[f"{called} at byte {member.offset}"] = "a later file of the same name in the tar file replaces it"
        elif not member.is_plain:
            listing.unused[called] = "in the tar file it is a link, or no plain file; put the file itself into it"
        elif member.offset + member.size > tar.stamp[0]:
            problems.add(called, f"{path}:{member.name}", "the tar file ends within it")
        else:
            file = DataFile(path, member.name, member.offset, member.size)
            stem, suffix = divided(called)
            if suffix in MEDIA:
                stamp = (*tar.stamp, member.offset, member.size)
                listing.items.append(Item(printable(called), Found(file, f"{tar.identity}:{member.name}", stamp), stem))
            else:
                listing.other(called, stem, suffix, file)
    _join_webdataset(listing, listing.items[first:])


def _read(tar: Found) -> tuple[list[Member], str]:
    """The members, and what is wrong behind the last of them."""
    with tar.file.path.open("rb") as stream:
        start = stream.read(8)
        if kind := next((kind for mark, kind in COMPRESSED.items() if start.startswith(mark)), None):
            raise _TarError(
                f"it is compressed ({kind}), so no single file of it can be read; uncompress it: pictures and clips are compressed "
                "already"
            )
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as opened:
            members = [
                Member(entry.name, entry.offset_data, entry.size, entry.isreg() and not entry.issparse())
                for entry in opened.getmembers()
                if not entry.isdir()
            ]
            end = opened.offset
        return members, _damage(stream, end, tar.stamp[0])


def _join_webdataset(listing: Listing, items: list[Item]) -> None:
    """``0001.left.jpg`` also belongs to ``0001.txt``, if nothing is called ``0001.left.txt``."""
    for item in items:
        if item.stem + ".txt" not in listing.texts and item.stem + ".json" not in listing.texts:
            folder, slash, last = item.stem.rpartition("/")
            short = folder + slash + last.partition(".")[0]
            if short + ".txt" in listing.texts or short + ".json" in listing.texts:
                item.stem = short


def _damage(stream: BinaryIO, end: int, size: int) -> str:
    """tarfile takes a header that it cannot read for the end: whether zeros, of which a tar file's end consists, follow there."""
    stream.seek(end)
    while block := stream.read(1 << 20):
        if block.count(0) != len(block):
            place = f"byte {end} of {size}"
            return f"its files behind {place} cannot be found: it is damaged there, or several tar files were put into one"
    return ""


def list_tar(tar: Found, memory: FileMemory, problems: Problems) -> Listing:
    listing = Listing("tar", nested=True)
    add_members(tar, "", listing, memory, problems)
    return listing
