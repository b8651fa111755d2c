"""What was found in a data set and what became of it: each file is a sample, or is named with its reason, or counted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from utils.data.values import Bucket
from utils.words import count

MAX_LISTED = 40
"""Files of one line or message; the rest is counted, and all of them are in the report's fields."""
FOLDERS, HIDDEN = "/", "."
"""What sub-folders and hidden files are counted under in ``ignored``."""


@dataclass
class DirectoryReport:
    """What became of one ``[[directory]]``.  Files are called by their names in it, as in the samples' keys."""

    name: str
    """Its name in the samples' keys."""
    path: Path
    kind: Literal["folder", "tar", "list"] = "folder"
    num_repeats: float = 1.0
    """As the settings have it; ``shown`` is what comes of it."""
    shown: Fraction = Fraction(0)
    """How many samples of it an epoch shows, on average over the epochs: repeats, ``is_reg`` and temperature in one."""
    is_reg: bool = False
    loss_weight: float = 1.0
    lists: list[str] = field(default_factory=list)
    """Lists in the folder that were read: ``metadata.jsonl`` and the like."""
    controls: int = 0
    """Control pictures of each item; the most that one has, where a list gives them different numbers."""
    pictures: int = 0
    clips: int = 0
    """Items that can be read; with or without a sample."""
    buckets: Counter[Bucket] = field(default_factory=Counter)
    """Samples in each bucket."""
    unused: dict[str, str] = field(default_factory=dict)
    """Files without any sample although nothing is wrong with them, and why: no bucket takes them, a link leads in a circle."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that cannot be used, and why.  Only with ``on_bad_sample = "skip"``; otherwise they end the run."""
    uncaptioned: int = 0
    """Items that have an empty caption because there is none for them."""
    masked: int = 0
    """Items with a mask, of a file or of their alpha channel."""
    unmasked: int = 0
    """Items without one, in a directory that asks for masks."""
    known_frames: int = 0
    """Clips with a given first or last frame."""
    cropped_mean: float = 0.0
    """Share of an item's area that is cut off, on average over the samples."""
    cropped_most: float = 0.0
    most_cropped: str = ""
    """The sample of which most is cut off, and how much."""
    upscaled: dict[str, float] = field(default_factory=dict)
    """Samples' keys, and how many times larger their sides become; only those that become larger."""
    left_over: dict[str, int] = field(default_factory=dict)
    """Clips of which whole pieces are taken, and how many frames at their ends belong to none."""
    stray: dict[str, list[str]] = field(default_factory=dict)
    """Folder of masks, control pictures or given frames -> files in it that belong to no item."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Suffixes of files that are no pictures, clips or captions; sub-folders under ``/``, hidden files under ``.``."""

    @property
    def samples(self) -> int:
        return self.buckets.total()

    @property
    def items(self) -> int:
        return self.pictures + self.clips

    def lines(self) -> list[str]:
        """For the log.  Every file that is not used is named."""
        repeats = f", each {self.num_repeats:g} times an epoch" if self.num_repeats != 1 else ""
        controls = f", with {count(self.controls, 'control picture')} each" if self.controls else ""
        found = [f"{self.name} ({self.path}): {count(self.clips, 'clip')}, {count(self.pictures, 'picture')}{controls}{repeats}"]
        if self.is_reg:
            found.append(f"  a regularisation set: {_about(self.shown)} samples of it are shown in an epoch")
        if self.lists:
            found.append(f"  read from {', '.join(self.lists)}")
        found += [f"  {bucket!s:>14}  {count(number, 'sample')}" for bucket, number in sorted(self.buckets.items())]
        found += [f"  skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        found += [f"  not used: {name}: {reason}" for name, reason in self.unused.items()]
        if self.uncaptioned:
            found.append(f"  without a caption, shown with an empty one: {count(self.uncaptioned, 'file')}")
        if self.masked or self.unmasked:
            found.append(f"  with a mask: {count(self.masked, 'file')}; without one, and counted everywhere: {self.unmasked}")
        if self.known_frames:
            found.append(f"  with a given first or last frame: {count(self.known_frames, 'clip')}")
        if self.cropped_mean >= 0.0005:
            most = f"at most {self.cropped_most:.1%} ({self.most_cropped})"
            found.append(f"  cut off: {self.cropped_mean:.1%} of the area on average, {most}")
        if self.upscaled:
            name = max(self.upscaled, key=lambda key: self.upscaled[key])
            found.append(f"  enlarged: {count(len(self.upscaled), 'sample')}, at most {self.upscaled[name]:.2f} times ({name})")
        if self.left_over:
            found.append(
                f"  {count(sum(self.left_over.values()), 'frame')} at the ends of {count(len(self.left_over), 'clip')} "
                "make no whole part and are not used"
            )
        found += [
            f"  {folder}: {count(len(names), 'file')} that belong to no item: {_some(names)}"
            for folder, names in self.stray.items()
        ]
        if self.ignored:
            special = {FOLDERS: "sub-folder", HIDDEN: "hidden file"}
            kinds = [f"{number} {kind or 'without suffix'}" for kind, number in sorted(self.ignored.items()) if kind not in special]
            kinds += [count(self.ignored[kind], name) for kind, name in special.items() if self.ignored[kind]]
            found.append(f"  not looked at: {', '.join(kinds)}")
        return found


@dataclass(frozen=True)
class ScanReport:
    """What is in the data set and what is used of it."""

    directories: list[DirectoryReport]
    duplicates: list[list[str]] = field(default_factory=list)
    """Files with the same bytes, each as ``<directory's name>/<file>``, in groups of two or more."""

    @property
    def unused(self) -> dict[str, str]:
        """``<directory's name>/<file>`` and why no sample was made of it, for one that is well and that no bucket takes."""
        return {f"{part.name}/{name}": reason for part in self.directories for name, reason in part.unused.items()}

    @property
    def skipped(self) -> dict[str, str]:
        """The same for files that cannot be used."""
        return {f"{part.name}/{name}": reason for part in self.directories for name, reason in part.skipped.items()}

    def lines(self) -> list[str]:
        """For the log and ``--check``."""
        found = [line for directory in self.directories for line in directory.lines()]
        if self.duplicates:
            number = sum(len(group) - 1 for group in self.duplicates)
            groups = [" = ".join(group) for group in self.duplicates]
            found.append(f"there more than once: {count(number, 'file')} of the same content as others: {_some(groups, '; ')}")
        return found


def _some(names: Iterable[str], between: str = ", ") -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return between.join(names[:MAX_LISTED]) + more


def _about(number: Fraction) -> str:
    return f"{number}" if number.denominator == 1 else f"about {float(number):.1f}"
