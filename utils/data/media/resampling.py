"""Frames by their times: which of a clip's frames are shown when it is played at another rate."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import TypeVar

Frame = TypeVar("Frame")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timeline:
    """When a clip's frames are shown, as far as it is worth keeping; times in seconds."""

    frames: int
    start: Fraction
    """When the first one is shown."""
    end: Fraction
    """When the last one begins to be shown."""
    rate: Fraction | None = None
    """For frames without times of their own: the rate at which they are counted.  None: frames tell their time."""

    @property
    def span(self) -> Fraction:
        return self.end - self.start

    @property
    def fps(self) -> Fraction:
        """Mean rate."""
        return (self.frames - 1) / self.span if self.span else self.rate or Fraction(1)

    def targets(self, fps: float, first_frame: int, count: int) -> list[Fraction]:
        """The times of ``count`` frames at ``fps``, from the one ``first_frame`` of these after the clip's first frame."""
        step = 1 / Fraction(fps)
        return [self.start + (first_frame + index) * step for index in range(count)]


def nearest(
    frames: Iterable[tuple[Fraction, Frame]],
    targets: list[Fraction],
    tolerance: Fraction,
    convert: Callable[[Frame], Result],
) -> Iterator[Result]:
    """For each target the frame nearest in time, of two equally near the earlier; ends where no frame is within ``tolerance``.

    ``convert`` is called once for each frame that is shown, and no frame is asked for behind the one that settles the last target.
    """
    waiting = deque(targets)
    before: tuple[Fraction, Callable[[], Result]] | None = None
    for time, frame in frames:
        now = (time, cache(partial(convert, frame)))
        while waiting and waiting[0] <= time:
            target = waiting.popleft()
            yield (before if before and target - before[0] <= time - target else now)[1]()
        if not waiting:
            return
        before = now
    while waiting and before and waiting.popleft() - before[0] <= tolerance:
        yield before[1]()
