"""Log lines that say how far a long piece of work is."""

import logging
import time

from utils.words import duration

log = logging.getLogger(__name__)


class ProgressLog:
    """Logs done, total and time left, at most every ``every`` seconds; work that is done sooner logs nothing."""

    def __init__(self, what: str, total: int, every: float = 10.0):
        self.what, self.total, self.every = what, total, every
        self._started = self._spoken = time.monotonic()
        self._first: float | None = None

    def report(self, done: int, share: float | None = None) -> None:
        """Say that ``done`` of the total are done, if it is time for a line.  What was done at the first call took no time.

        ``share``: the part of all work that this is, where things take unequal time; without it each takes the same.
        """
        now = time.monotonic()
        share = done / max(1, self.total) if share is None else share
        if self._first is None:
            self._first = share
        if now - self._spoken < self.every:
            return
        self._spoken = now
        here = share - self._first
        left = f", {duration((1 - share) * (now - self._started) / here)} left" if here > 0 else ""
        log.info("%s: %d of %d%s", self.what, done, self.total, left)
