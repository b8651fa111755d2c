"""What lies in a folder, a tar file or a list, before any of it is opened."""

import os
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from utils.data.media.files import DataFile, printable
from utils.data.media.pixels import CLIPS, PICTURES

MEDIA = PICTURES | CLIPS
TEXTS = frozenset({".txt", ".json"})
KNOWN_FRAMES: tuple[Literal["first", "last"], ...] = ("first", "last")
KINDS = ", ".join(sorted(MEDIA))


@dataclass(slots=True)
class Found:
    """A file that was found."""

    file: DataFile
    identity: str
    """Where it is, with links to folders resolved: the same for the same file, however it was come upon."""
    stamp: tuple[int, ...]
    """What changes when it does: size, time of change in ns, number in the file system; for a member those of the tar file."""


@dataclass(slots=True)
class Item:
    """A picture or clip, with what its folder, tar file or list says of it."""

    name: str
    """In its directory: ``cat.png``, ``sub/cat.png``, a member's name.  Different for each, and one line of text."""
    found: Found
    stem: str
    """What files that belong to it have in common with it: its path in the directory, without the suffix."""
    caption: Any = None
    """What the row of a list has for it, not yet checked; None: nothing."""
    row: str | None = None
    """Which row of a list it has, by file and line."""
    folder_caption: str | None = None
    """What is its caption if it has none, from the name of its folder."""
    repeats: Fraction = Fraction(1)
    """How often it is shown in comparison to the others, from its folder's name or its row."""
    box: tuple[int, int, int, int] | None = None
    controls: tuple[Found, ...] = ()
    mask: Found | None = None
    known_frames: dict[Literal["first", "last"], Found] = field(default_factory=dict)


@dataclass
class Listing:
    """Everything in one ``[[directory]]``."""

    kind: Literal["folder", "tar", "list"]
    items: list[Item] = field(default_factory=list)
    texts: dict[str, str | DataFile] = field(default_factory=dict)
    """Caption files by stem and suffix in small letters; a path on the disk, or a member of a tar file."""
    text_names: dict[str, str] = field(default_factory=dict)
    """Their names in the directory."""
    others: dict[str, str] = field(default_factory=dict)
    """Stems of files of other kinds, and their names."""
    lists: list[str] = field(default_factory=list)
    """Lists in the folder that were read."""
    nested: bool = False
    """Whether items may lie in sub-folders, so that what belongs to them may too."""
    set_aside: set[str] = field(default_factory=set)
    """Stems of pictures and clips that are no items: masks and the like of others, and what is named as unused or wrong."""
    uncaptioned: set[str] = field(default_factory=set)
    """Items that have an empty caption because there is none for them."""
    unused: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    def other(self, name: str, stem: str, suffix: str, file: str | DataFile) -> None:
        """File what is no picture or clip under what its suffix says; ``name`` and ``stem`` are those in the directory."""
        if suffix in TEXTS and stem + suffix not in self.texts:
            self.texts[stem + suffix] = file
            self.text_names[stem + suffix] = name
        else:
            self.ignored[suffix] += 1
            if suffix not in TEXTS:
                self.others[stem] = name


def divided(name: str) -> tuple[str, str]:
    """A file's name without its suffix, and the suffix in small letters with its point.  A point at the start of a name is none."""
    place = name.rfind(".")
    if place <= name.rfind("/") + 1:
        return name, ""
    return name[:place], name[place:].lower()


def stamp_of(state: os.stat_result) -> tuple[int, ...]:
    return state.st_size, state.st_mtime_ns, state.st_ino


class Problems:
    """What is wrong in the data set, of which all is told at once.

    ``whole`` are places and settings that are wrong as a whole, and end the run; the others are of single files of a directory.
    """

    def __init__(self) -> None:
        self.whole: list[str] = []
        self.files: dict[str, tuple[str, str]] = {}
        """By the file's name in its directory: what it is called in a message, and what is wrong with it."""

    def add(self, name: str, place: object, reason: str) -> None:
        """``place``: the file's path, or the line of a list.  Of several reasons all are kept."""
        called, before = self.files.get(name, (printable(str(place)), ""))
        reason = printable(reason.strip())
        self.files[name] = called, f"{before}; {reason}" if before else reason

    def lines(self) -> list[str]:
        return self.whole + [f"{place}: {reason}" for place, reason in self.files.values()]
