"""Files that a user drops into the folder of a running training, as ``touch RUN/request-checkpoint`` does.

A file is removed when what it asks for is done, or has failed and said so.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from utils.stopping import Wishes

# What can be asked for, each by its file.
FILES = {"checkpoint": "request-checkpoint", "export": "request-export", "stop": "request-stop"}
LOOK_SECONDS = 1.0


class Requests:
    """What is asked for by files in a run's folder.  Rank 0 looks at them; on others nothing is ever there."""

    def __init__(self, run_folder: Path, clock: Callable[[], float] = time.monotonic):
        self.folder, self._clock = run_folder, clock
        self._looked: float | None = None
        self._waiting: set[str] = set()
        """Seen, and nothing done about it yet."""
        self._begun: dict[str, int] = {}
        """What is being done about it, with the step."""

    def look(self) -> Wishes:
        """What is waiting.  The disk is looked at once a second at most."""
        now = self._clock()
        if self._looked is None or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._waiting = {kind for kind in FILES if kind not in self._begun and self._is_there(kind)}
        reasons = {kind: f"the file {FILES[kind]}" for kind in self._waiting}
        # Not a stop as by a signal, after which the run would be started again.
        return Wishes(checkpoint=reasons.get("checkpoint", ""), export=reasons.get("export", ""), finish=reasons.get("stop", ""))

    def begun(self, kind: str, step: int) -> None:
        """What is saved at this step is what a waiting file asks for."""
        if kind in self._waiting:
            self._waiting.discard(kind)
            self._begun[kind] = step

    def done(self, kind: str, step: int) -> None:
        """What was begun at this step has ended."""
        if kind in self._begun and self._begun[kind] <= step:
            with suppress(OSError):  # of a disk that has become read-only
                (self.folder / FILES[kind]).unlink(missing_ok=True)
                del self._begun[kind]

    def _is_there(self, kind: str) -> bool:
        try:
            return (self.folder / FILES[kind]).exists()
        except OSError:
            return False
