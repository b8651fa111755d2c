"""Files that a user drops into the folder of a running training, as ``touch RUN/request-checkpoint`` does.

A file is removed when what it asks for is done, or has failed and said so.  What a run could not do before it was ended stays for
the next start.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from utils.stopping import Stopper, Wishes

# What can be asked for, each by its file.
FILES = {"checkpoint": "request-checkpoint", "export": "request-export", "finish": "request-stop"}
SAVED = ("checkpoint", "export")
LOOK_SECONDS = 1.0


class Requests:
    """What is asked for by files in a run's folder.  Rank 0 looks at them, for all."""

    def __init__(self, run_folder: Path, clock: Callable[[], float] = time.monotonic):
        self.folder, self._clock = run_folder, clock
        self._looked: float | None = None
        self._waiting: set[str] = set()
        """Seen, and nothing done about it yet."""
        self._begun: dict[str, int] = {}
        """What is being done about it, with the step."""

    def look(self) -> Wishes:
        """What waits to be saved.  The disk is looked at once a second at most."""
        now = self._clock()
        if self._looked is None or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._waiting = {kind for kind in SAVED if kind not in self._begun and self._is_there(kind)}
        return Wishes(**{kind: _reason(kind) for kind in self._waiting})

    def watch(self, stopper: Stopper) -> None:
        """Look for ``request-stop`` from now on, in a thread: the run may be encoding or loading, and the disk may not answer."""

        def ask() -> None:
            # Not a stop as by a signal, after which the run would be started again.
            stopper.ask(_reason("finish"), "finish", obeyed=lambda: self._remove("finish"))

        def look_again() -> None:
            while not self._is_there("finish"):
                time.sleep(LOOK_SECONDS)
            ask()

        if self._is_there("finish"):
            ask()
        else:
            threading.Thread(target=look_again, name="requests", daemon=True).start()

    def begun(self, kind: str, step: int) -> None:
        """What is saved at this step is what a waiting file asks for."""
        if kind in self._waiting:
            self._waiting.discard(kind)
            self._begun[kind] = step

    def done(self, kind: str, step: int) -> None:
        """What was begun at this step has ended."""
        if kind in self._begun and self._begun[kind] <= step and self._remove(kind):
            del self._begun[kind]

    def finished(self) -> None:
        """The run is at its end, and has saved everything that can be asked for."""
        for kind in SAVED:
            self._remove(kind)

    def _remove(self, kind: str) -> bool:
        with suppress(OSError):  # of a disk that has become read-only
            (self.folder / FILES[kind]).unlink(missing_ok=True)
            return True
        return False

    def _is_there(self, kind: str) -> bool:
        try:
            return (self.folder / FILES[kind]).exists()
        except OSError:
            return False


def _reason(kind: str) -> str:
    return f"the file {FILES[kind]}"
