"""Ending a run before it is done: who may ask for it, and how all ranks come to do the same.

A signal may reach one rank or all of them, once or several times.  So a signal only leaves a wish; after every step the ranks
exchange their wishes, and what one of them wants all of them do, at the same place.  Where ranks work apart (encoding), they
poll :meth:`Stopper.asked`, and meet afterwards.

This module is imported before the slow ones, so that a signal during their import is a wish too; it imports no torch.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

log = logging.getLogger(__name__)

DONE, FAILED, USER_ERROR, RUN_AGAIN = 0, 1, 2, 75
"""Exit codes: finished; an accident, of which a restart may know nothing any more; something the user must put right; told to stop,
saved, and ready to go on (75 is EX_TEMPFAIL of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_PRESS_SECONDS = 1.0
"""Interrupts so close to each other are one: a launcher forwards what the terminal has sent to every process already."""
LEAST_MARGIN_SECONDS = 60.0
"""What is kept free at the end of ``[limits] time`` at least: for ending a step, saving, and taking the processes down."""
JOB_START = ("FLOWSTAGE_JOB_START", "SLURM_JOB_START_TIME")
"""Variables that tell when the job began, in seconds since 1970: a launcher's that starts ranks again, and Slurm's."""

_process_start = time.time()


@dataclass(frozen=True)
class Wishes:
    """What a rank asks for after this step, each with its reason; empty: not asked for."""

    stop: str = ""
    """Save, end, and exit with ``RUN_AGAIN``."""
    finish: str = ""
    """Save, end, and exit with ``DONE``: the run is not to be started again by itself."""
    checkpoint: str = ""
    """Write a checkpoint and go on."""
    export: str = ""
    """Write an export and go on."""

    @classmethod
    def of_all(cls, wishes: Iterable["Wishes"]) -> "Wishes":
        """What all ranks do: whatever one of them asks for, with the reason of the first that does."""
        wishes = list(wishes)
        return cls(**{field.name: next(filter(None, (getattr(each, field.name) for each in wishes)), "") for field in fields(cls)})

    @property
    def ends(self) -> str:
        """Why the run ends after this step, or nothing."""
        return self.stop or self.finish


class Stopped(Exception):
    """All ranks agreed to end before the work is done; everything that was asked for is on the disk."""

    def __init__(self, reason: str, exit_code: int = RUN_AGAIN):
        super().__init__(reason)
        self.exit_code = exit_code

    @classmethod
    def by(cls, agreed: Wishes) -> "Stopped":
        """What the ranks agreed on ends the run.  A signal goes before a file: the next start sees the file again."""
        return cls(agreed.ends, RUN_AGAIN if agreed.stop else DONE)


class Stopper:
    """This process's wish to end: from a signal, the time limit or a file, or because another rank told of one.

    A wish is ``stop`` or ``finish``, as :class:`Wishes` has them.
    """

    def __init__(self) -> None:
        self.margin = LEAST_MARGIN_SECONDS
        self._tell: Callable[[str, str], None] = lambda wish, reason: None
        self._place = ""
        self._own: dict[str, str] = {}
        self._heard: dict[str, str] = {}
        self._obeyed: list[Callable[[], None]] = []
        self._end: float | None = None

    def listen(self) -> None:
        """Catch the signals from now on; called by the main thread.

        They are received by a thread, through the interpreter's wake-up descriptor: a handler in Python would wait for the main
        thread to come back from a collective.
        """
        receive, send = os.pipe()
        os.set_blocking(send, False)
        threading.Thread(target=self._receive, args=(receive,), name="signals", daemon=True).start()
        signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def _receive(self, descriptor: int) -> None:
        interrupted: float | None = None
        while True:
            for number in os.read(descriptor, 64):
                if number not in SIGNALS:
                    continue
                if number == signal.SIGINT:
                    if interrupted is not None and time.monotonic() - interrupted > ONE_PRESS_SECONDS:
                        log.warning("interrupted again: ending at once, without saving")
                        leave(128 + signal.SIGINT, at_once=True)
                    interrupted = interrupted or time.monotonic()
                self.ask(signal.Signals(number).name)

    def limit(self, seconds: float, environment: Mapping[str, str] = os.environ) -> None:
        """End so many seconds after the job began, less the margin."""
        start = next((float(environment[name]) for name in JOB_START if environment.get(name)), _process_start)
        self._end = time.monotonic() + start + seconds - time.time()
        self._limit = seconds

    def needs(self, seconds: float) -> None:
        """Ending takes so long, as far as was seen: the longest step and the longest save."""
        self.margin = max(LEAST_MARGIN_SECONDS, seconds)

    def connect(self, tell: Callable[[str, str], None], place: str) -> None:
        """``tell(wish, reason)`` tells the other ranks, at once of what this one was asked before; any thread may call it.

        ``place`` is added to this process's own reasons to stop, for the others: `` on rank 3``.
        """
        self._tell, self._place = tell, place
        for wish in list(self._own):
            tell(wish, self._reason(wish))

    def ask(self, reason: str, wish: str = "stop", obeyed: Callable[[], None] | None = None) -> None:
        """Ask for the end; the first reason stays.  ``obeyed``: to be called when the run has ended for it, with all saved."""
        if wish in self._own:
            return
        self._own[wish] = reason
        if obeyed:
            self._obeyed.append(obeyed)
        log.info("%s: the run stops as soon as it can", reason)
        self._tell(wish, self._reason(wish))

    def _reason(self, wish: str) -> str:
        return self._own[wish] + (self._place if wish == "stop" else "")

    def hear(self, wish: str, reason: str) -> None:
        """Another rank was asked."""
        self._heard.setdefault(wish, reason)

    def wishes(self) -> Wishes:
        """Whether and why to end.  Cheap: it may be called for every item."""
        if not self._own and self._end is not None and time.monotonic() >= self._end - self.margin:
            self.ask(f"the time limit of {self._limit:.0f} s is {self.margin:.0f} s away")
        return Wishes(**{**self._heard, **{wish: self._reason(wish) for wish in list(self._own)}})

    def asked(self) -> str:
        """Why to end, or nothing."""
        return self.wishes().ends

    def obeyed(self) -> None:
        """The run has come to an end that is not to be followed by another start."""
        for call in self._obeyed:
            call()


def leave(code: int, *, at_once: bool = False) -> None:
    """End this process with an exit code that no late signal and no library's thread changes.

    ``at_once`` is for threads.  A run that is done ends the interpreter in the usual way.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once or code != DONE:
        os._exit(code)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
