"""Ends this process when the run cannot go on because of another one, and when it hangs; says why in the last line of the log.

A rank whose neighbour is gone sits in a collective that never returns.  So a thread does the watching and, in the end, the leaving.

Two things are taken for a hang: a step that takes far longer than the ones before, and, at any place, a process that gives no sign
of life for long: one that is stopped, or whose machine is frozen or swaps.  What takes long outside of a step is waited for: nobody
knows how long a data set takes to encode.
"""

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from utils.config.schema import LimitsConfig, seconds_in
from utils.control import ALIVE, ControlLine, Message
from utils.errors import UserError
from utils.stopping import FAILED, USER_ERROR, Stopped, Stopper, Wishes, leave
from utils.topology import Topology

log = logging.getLogger(__name__)

UNMEASURED_STEPS = 3
"""Steps of a start that are not measured: they compile, connect and fill caches."""
HANG_FACTOR, LEAST_HANG_SECONDS = 10, 600.0
ALIVE_SECONDS = 5.0
"""Between two signs of life of a rank."""
LEAST_SILENCE_SECONDS = 20.0
"""Silence that is no hang whatever ``hang_timeout`` says.  A Python thread gives the signs, and native code that loads a library or
starts a device may keep all of those waiting for seconds."""
NAMED_RANKS = 8
NEWS_SECONDS = 3.0
"""How long a rank that fails waits for the news that it fails on account of another."""
NOTICE_SECONDS = 600.0
"""After so long rank 0 says whom it waits for at a safe point."""
ANSWER_SECONDS = 5.0
"""How long the ranks may take to write their stacks."""


@dataclass
class _Sign:
    """The last sign of life of a rank."""

    phase: str = "start-up"
    silence: float = 0.0
    """Seconds since then, as far as this process was awake itself."""


class Watchdog:
    """Watches from its making to the end of the ``with`` block, which all ranks leave together or not at all.

    ``phase`` is what this rank is at, in words that follow "during".
    """

    def __init__(self, topology: Topology, stopper: Stopper, limits: LimitsConfig | None = None):
        """Collective."""
        self.topology, self.stopper = topology, stopper
        self.folder: Path | None = None
        """Where stacks are written, once it is known."""
        self.phase = "start-up"
        self._timeout = seconds_in(limits.hang_timeout) if limits and limits.hang_timeout else None
        self._steps = 0
        self._seconds: deque[float] = deque(maxlen=20)
        self._deadline: float | None = None
        self._waits_since: float | None = None
        self._noticed = 0.0
        self._hang = ""
        self._silent: int | None = None
        """The rank whose silence is the hang."""
        self._answered: set[int] = set()
        self._closing = False
        self._handlers = {
            ALIVE: lambda message: self._signs.update({message["rank"]: _Sign(message["phase"])}),
            "stop": lambda message: stopper.hear(message["wish"], message["reason"]),
            "gone": lambda message: self._end(message["text"], message["code"], message["rank"]),
            "bye": self._departs,
            "lost": self._lost,
            "hung": lambda message: self._hangs(message["text"]),
            "stacks": lambda message: self._answered.add(message["rank"]),
        }
        self._departed: set[int] = set()
        self.line = ControlLine(topology)
        self._signs = {rank: _Sign() for rank in self.line.connected}
        place = f" on rank {topology.rank}" if topology.world_size > 1 else ""
        stopper.connect(lambda wish, reason: self.line.send("stop", wish=wish, reason=reason), place)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    # ── what this rank does ───────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Stopped) or getattr(error, "everywhere", False):
            # Launchers end all processes when the first one ends with another code than 0: nothing may be left to do then.
            self.phase = "the end of the run"
            self.topology.barrier()
            self._closing = True
            self.line.send("bye")
        else:
            by_user = isinstance(error, UserError)
            if not (by_user and self.topology.is_main):
                # Another rank's end may be the cause, or rank 0 may have the same error: then its news ends this process here.
                time.sleep(NEWS_SECONDS)
            self._closing = True
            what = str(error) if by_user else f"{kind.__name__}: {error}"
            text = f"{self.describe(self.topology.rank)} failed during {self.phase}: {what}"
            self.line.send("gone", text=text, code=USER_ERROR if by_user else FAILED)
            time.sleep(0.5)  # what is sent should arrive before the connection ends
        self.stopper.connect(lambda wish, reason: None, "")
        self.line.wake()
        self._thread.join()
        self.line.close()

    def safe_point(self, phase: str) -> None:
        """Collective: raises Stopped on all ranks if one was asked to stop; else the run goes on to ``phase``."""
        self.phase, self._waits_since = f"the wait after {self.phase}", time.monotonic()
        agreed = Wishes.of_all(self.topology.gather(self.stopper.wishes()))
        self._waits_since = None
        if agreed.ends:
            raise Stopped.by(agreed)
        self.phase = phase

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around an optimizer step: it may not take far longer than the ones before."""
        began, limit = time.monotonic(), self.limit
        self.phase = f"step {number}"
        if limit is not None:
            self._deadline = began + limit
            # For a rank that hangs without ever letting its Python threads run: this one is the interpreter's own.
            faulthandler.dump_traceback_later(limit + 10 * ANSWER_SECONDS, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            self._deadline = None
            if limit is not None:
                faulthandler.cancel_dump_traceback_later()
        self._steps += 1
        if self._steps > UNMEASURED_STEPS:
            self._seconds.append(time.monotonic() - began)
        self.phase = f"the time after step {number}"

    @property
    def longest_step(self) -> float:
        """Seconds, of the recent steps."""
        return max(self._seconds, default=0.0)

    @property
    def limit(self) -> float | None:
        """Seconds after which a step is taken for hung; None before the first ones are measured."""
        if not self._seconds:
            return None
        return self._timeout or max(LEAST_HANG_SECONDS, HANG_FACTOR * statistics.median(self._seconds))

    @property
    def silence_limit(self) -> float:
        """Seconds without a sign of life after which a rank is taken for hung, wherever it is."""
        return max(LEAST_SILENCE_SECONDS, self._timeout or LEAST_HANG_SECONDS)

    def describe(self, rank: int) -> str:
        return f"rank {rank} (stage {rank // self.topology.replicas}, host {self.line.hosts[rank]})"

    # ── what the thread does ──────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        looked = told = time.monotonic()
        told_phase = ""
        while not self._closing:
            for message in self.line.receive(timeout=1.0):
                if not self._closing:
                    self._handlers[message["kind"]](message)
            now = time.monotonic()
            if now - told >= ALIVE_SECONDS or self.phase != told_phase:
                told, told_phase = now, self.phase
                self.line.send(ALIVE, phase=told_phase)
            # Not the time in which this process was stopped itself, as all are when a job is suspended and goes on.
            self._listen(min(now - looked, ALIVE_SECONDS))
            looked = now
            self._notice(now)
            if self._deadline is not None and time.monotonic() > self._deadline:
                usual = statistics.median(self._seconds)
                self._hangs(f"{self.phase} takes more than {self.limit:.0f} s; recent ones took {usual:.1f} s")
            if self._hang:
                self._end_hang()

    def _listen(self, seconds: float) -> None:
        """So much time has gone by in which a rank might have given a sign."""
        for rank, sign in self._signs.items():
            sign.silence += seconds
            if sign.silence > self.silence_limit and not self._hang and not self._closing:
                self._silent = rank
                self._hangs(
                    f"{self.describe(rank)} has given no sign of life for {self.silence_limit:.0f} s, during {sign.phase}: "
                    "its process is stopped, or its machine is frozen or swaps"
                )

    def _notice(self, now: float) -> None:
        """Say whom rank 0 has been waiting for."""
        since = self._waits_since
        if self.topology.is_main and since is not None and now - max(since, self._noticed) > NOTICE_SECONDS:
            self._noticed = now
            others = ", ".join(self._elsewhere()[:NAMED_RANKS]) or "all ranks are there"
            log.warning("%.0f minutes of waiting: %s", (now - since) / 60, others)

    def _elsewhere(self) -> list[str]:
        """The connected ranks that are not where this one is, with their places."""
        others = {rank: sign.phase for rank, sign in self._signs.items() if sign.phase != self.phase and rank != self._silent}
        return [f"{self.describe(rank)} is at {phase}" for rank, phase in others.items()]

    def _departs(self, message: Message) -> None:
        self._departed.add(message["rank"])
        self._signs.pop(message["rank"], None)

    def _lost(self, message: Message) -> None:
        rank = message["rank"]
        self._signs.pop(rank, None)
        if self._hang:
            if rank == 0:
                self._end("", FAILED, 0)  # rank 0 has told it all
        elif rank not in self._departed:
            text = f"{self.describe(rank)} vanished during {self.phase}, without a word: killed, or its machine cannot be reached"
            self.line.send("gone", text=text, code=FAILED)
            self._end(text, FAILED, rank)

    def _hangs(self, text: str) -> None:
        if self._hang:
            return
        self._hang, self._hang_noticed = text, time.monotonic()
        threading.Timer(4 * ANSWER_SECONDS, os._exit, (FAILED,)).start()  # should the disk be what hangs
        self._write_stacks(text)
        self._answered.add(self.topology.rank)
        self.line.send("hung", text=text)
        self.line.send("stacks")

    def _write_stacks(self, text: str) -> None:
        if self.folder is None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            return
        with suppress(OSError), (self.folder / f"stacks-rank-{self.topology.rank}.txt").open("a") as file:
            file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {self.describe(self.topology.rank)}: {text}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _end_hang(self) -> None:
        """Leave when every rank has written its stacks, or has had its time; the others leave after rank 0, which tells of it."""
        waited = time.monotonic() - self._hang_noticed
        missing = sorted(set(range(self.topology.world_size)) - self._answered)
        if waited > (ANSWER_SECONDS if self.topology.is_main else 2 * ANSWER_SECONDS) or (not missing and self.topology.is_main):
            unnamed = [rank for rank in missing if rank != self._silent]
            found = [f"no answer from {', '.join(map(self.describe, unnamed))}"] if unnamed else self._elsewhere()[:NAMED_RANKS]
            place = f"in {self.folder}" if self.folder else "above"
            text = "; ".join([f"the run hangs: {self._hang}", *found, f"the stacks of its ranks are {place}"])
            self._end(text, FAILED, 0 if 0 in missing else None)

    def _end(self, text: str, code: int, lost: int | None) -> None:
        """Leave, whatever the other threads are stuck in."""
        threading.Timer(5.0, os._exit, (code,)).start()  # should the log be stuck too
        if self.topology.is_main:
            time.sleep(1.0)  # this is to be the last line, after what a failing rank writes itself
        if text and self._speaks(lost):
            again = "" if code == USER_ERROR else "; started again, it continues from its last checkpoint"
            log.error("%s. The run ends%s", text, again)
        leave(code, at_once=True)

    def _speaks(self, lost: int | None) -> bool:
        """One rank of each machine tells what it knows."""
        here = [rank for rank, host in enumerate(self.line.hosts) if host == self.line.hosts[self.topology.rank]]
        return self.topology.rank == min(rank for rank in here if rank != lost)
