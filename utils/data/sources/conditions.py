"""What belongs to items beside their captions: control pictures, masks, given first and last frames, in folders of their own."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from utils.config.dataset import DirectoryConfig
from utils.data.media.files import MediaError, printable
from utils.data.media.pixels import PICTURES, MediaInfo, frames_at
from utils.data.sources.folders import walk
from utils.data.sources.listing import KNOWN_FRAMES, MEDIA, Found, Item, Listing, Problems, divided
from utils.data.sources.looks import Look
from utils.data.values import ControlRules, SizeRules

SHAPE_TOLERANCE = 0.02
"""How much wider or narrower than its item a mask may be, as a share: it may have been scaled and rounded."""


class Beside:
    """The files of a folder by what they have in common with items: their path without the suffix."""

    def __init__(self, key: str, folder: Path, listing: Listing, kinds: Collection[str], problems: Problems):
        self.folder, self.problems = folder, problems
        self.files: dict[str, Found] = {}
        self.twice: dict[str, list[str]] = {}
        self.names: dict[str, str] = {}
        self.used: set[str] = set()
        self.readable = True
        for part in walk(folder, listing.nested):
            if isinstance(part, tuple):
                where, error = part
                self.readable = False
                problems.whole.append(
                    f"{key} = {printable(str(folder / where))!r}: the folder cannot be read ({error.strerror}); correct the path"
                )
                continue
            for entry in part.files:
                stem, suffix = divided(part.name + entry.name)
                if suffix not in kinds:
                    continue
                if stem in self.files:
                    self.twice.setdefault(stem, [self.names[stem]]).append(part.name + entry.name)
                    continue
                with suppress(OSError):  # it has vanished since the folder was read: its item has none
                    self.files[stem], self.names[stem] = part.found(entry), part.name + entry.name
        self._stems = [item.stem for item in listing.items]
        last = [stem.rpartition("/")[2] for stem in self._stems]
        self._alone = {name for name, times in _counted(zip(last, self._stems, strict=True)).items() if times == 1}

    def of(self, item: Item) -> Found | None:
        """The item's own file: of the same path in the folder or, if no other item is called so, of the same name."""
        stem = item.stem
        if stem not in self.files:
            stem = stem.rpartition("/")[2]
            if stem not in self.files or stem not in self._alone:
                return None
        if stem in self.twice:
            several = " and ".join(map(printable, self.twice[stem]))
            self.problems.add(item.name, item.found.file, f"{self.folder} has {several} for it; keep one of them")
        self.used.add(stem)
        return self.files[stem]

    @property
    def stray(self) -> list[str]:
        """Files that belong to no item."""
        return sorted(printable(name) for stem, name in self.names.items() if stem not in self.used)


def _counted(names: "Collection[tuple[str, str]] | zip[tuple[str, str]]") -> dict[str, int]:
    """How many different items are called by each name."""
    stems: dict[str, set[str]] = {}
    for name, stem in names:
        stems.setdefault(name, set()).add(stem)
    return {name: len(found) for name, found in stems.items()}


def add_conditions(
    directory: DirectoryConfig, listing: Listing, rules: SizeRules, controls: ControlRules, problems: Problems
) -> dict[str, list[str]]:
    """Give the items what belongs to them; what a list gave them already stays.  Returns each folder's files without an item.

    An item that lacks something is wrong, but for masks.
    """
    searched: list[Beside] = []

    def folder(key: str, path: Path, kinds: Collection[str]) -> Beside:
        searched.append(Beside(key, path, listing, kinds, problems))
        return searched[-1]

    for path in directory.control_paths:
        beside = folder("control_path", path, PICTURES)
        for item in listing.items:
            if found := beside.of(item):
                item.controls += (found,)
            elif beside.readable:
                problems.add(item.name, item.found.file, _missing(item, path, "control picture"))
    for item in listing.items:
        if not controls.allows(len(item.controls)) and item.name not in problems.files:
            number = len(item.controls)
            reason = f"it has {number or 'no'} control picture{'s' * (number != 1)}, and this model takes {controls} for each item"
            problems.add(item.name, item.row or item.found.file, reason)
    if directory.mask_path:
        beside = folder("mask_path", directory.mask_path, MEDIA)
        for item in listing.items:
            item.mask = item.mask or beside.of(item)
    for end in KNOWN_FRAMES:
        if path := getattr(directory, f"{end}_frame_path"):
            beside = folder(f"{end}_frame_path", path, PICTURES)
            for item in listing.items:
                if end not in item.known_frames and (found := beside.of(item)):
                    item.known_frames[end] = found
        for item in listing.items:
            if end in item.known_frames and end not in rules.known_frames:
                reason = f"{end}_frame: this model is not shown {'a given' if rules.known_frames else 'any'} {end} frame; remove it"
                problems.add(item.name, item.row or item.found.file, reason)
                del item.known_frames[end]
    return {str(beside.folder): beside.stray for beside in searched if beside.stray}


def check_conditions(
    directory: DirectoryConfig, item: Item, info: MediaInfo, looks: Mapping[str, Look | MediaError], fps: float | None
) -> Iterator[str]:
    """What is wrong with an item's box, and with what belongs to it; ``looks`` by the files' identities.

    A picture has no given frames: it is one frame itself.
    """
    if item.box and not (item.box[2] <= info.width and item.box[3] <= info.height):
        yield f"crop = {[*item.box]} is no part of its {info.width}x{info.height} pixels"
    if info.fps is None:
        given = [end for end in item.known_frames if getattr(directory, f"{end}_frame_path") is None]
        yield from (f"{end}_frame: it is a picture, and only a clip has a given {end} frame; remove it" for end in given)
        item.known_frames = {}
    for end in KNOWN_FRAMES:
        if info.fps is not None and (path := getattr(directory, f"{end}_frame_path")) and end not in item.known_frames:
            yield _missing(item, path, f"picture of the {end} frame")
    named = [("mask", item.mask), *(("control picture", found) for found in item.controls)]
    named += [(f"picture of the {end} frame", found) for end, found in item.known_frames.items()]
    for what, found in named:
        look = looks[found.identity] if found else None
        if isinstance(look, MediaError):
            yield f"its {what}: {look}"
        elif look and what == "mask" and (reason := _mask_problem(look.info, info, fps)):
            yield f"its mask {found.file}: {reason}"


def _mask_problem(mask: MediaInfo, info: MediaInfo, fps: float | None) -> str | None:
    """Why a mask does not lie on its item."""
    if abs(mask.width * info.height / (mask.height * info.width) - 1) > SHAPE_TOLERANCE:
        return f"it has {mask.width}x{mask.height} pixels, another shape than the item's {info.width}x{info.height}"
    if mask.fps is None:
        return None
    if info.fps is None:
        return "it is a clip, and the item is a picture"
    if fps and frames_at(mask, fps) < frames_at(info, fps):
        return f"it has {frames_at(mask, fps)} frames at {fps:g} fps, and the item has {frames_at(info, fps)}"
    return None


def _missing(item: Item, folder: Path, what: str) -> str:
    name = printable(divided(item.found.file.name)[0])
    return f"there is no {what} of that name in {printable(str(folder))}; add {name}.png or the like"
