"""Sizes, times and tables as people read them."""

from collections.abc import Sequence


def size(number: float) -> str:
    """Bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} bytes"


def age(seconds: float) -> str:
    for unit, factor in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{max(0, seconds):.0f} s"


def duration(seconds: float) -> str:
    """A time that is guessed."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: int, what: str, several: str = "") -> str:
    """A number of things; ``several``: their name in the plural, where it does not end in s."""
    return f"{number} {what if number == 1 else several or what + 's'}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
