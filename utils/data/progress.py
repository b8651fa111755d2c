"""Log lines that say how far a long piece of work is."""

import logging
import time

log = logging.getLogger(__name__)


class ProgressLog:
    """Logs done, total and time left, at most every ``every`` seconds; work that is done sooner logs nothing."""

    def __init__(self, what: str, total: int, every: float = 10.0):
        self.what, self.total, self.every = what, total, every
        self._started = self._spoken = time.monotonic()
        self._first: int | None = None

    def report(self, done: int) -> None:
        """Say that ``done`` of the total are done, if it is time for a line.  What was done at the first call took no time."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._spoken < self.every:
            return
        self._spoken = now
        here = done - self._first
        left = f", {_duration((self.total - done) * (now - self._started) / here)} left" if here else ""
        log.info("%s: %d of %d%s", self.what, done, self.total, left)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
