"""Which parts of a clip become samples.  Lengths and places are in frames at the rate that clips are resampled to."""

from collections.abc import Callable

from utils.config.dataset import ClipMode


def first_frames(mode: ClipMode, available: int, length: int, clips_per_video: int | None) -> list[int]:
    """Where each part of ``length`` frames begins in a clip that has ``available`` of them, at least ``length``; rising."""
    return _PARTS[mode](available, length, clips_per_video or 1)


def left_over(mode: ClipMode, available: int, length: int) -> int:
    """Frames at the end of a clip that are not used because they make no whole part, where whole parts are asked for."""
    return available % length if mode == "non_overlapping" else 0


def _evenly(number: int, room: int) -> list[int]:
    """``number`` different places from 0 to ``room``, fewer if there are not as many; one alone is in the middle."""
    if number == 1:
        return [room // 2]
    return sorted({part * room // (number - 1) for part in range(number)})


_PARTS: dict[ClipMode, Callable[[int, int, int], list[int]]] = {
    "single_beginning": lambda available, length, number: [0],
    "single_middle": lambda available, length, number: [(available - length) // 2],
    "multiple_overlapping": lambda available, length, number: _evenly(-(-available // length), available - length),
    "non_overlapping": lambda available, length, number: [part * length for part in range(available // length)],
    "uniform": lambda available, length, number: _evenly(number, available - length),
}
"""From (frames of the clip, frames of a part, ``clips_per_video``)."""
