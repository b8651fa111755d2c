"""The checkpoints of one run: saved beside training, found again, kept as long as they are wanted.

Training stands still for a copy to host memory; the writing goes on behind it, one checkpoint at a time.  A checkpoint that cannot
be written costs that checkpoint, with a loud message, and neither an older one nor the run.
"""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from utils.checkpoints.checkpoint import Checkpoint, Progress
from utils.checkpoints.disk import Disk
from utils.checkpoints.host_copy import HostCopy, available_host_bytes, live_contents
from utils.checkpoints.retention import Retention
from utils.checkpoints.writer import PARTIAL, CheckpointWriter, Job
from utils.errors import UserError, listed
from utils.topology import Topology

__all__ = ["Checkpoint", "CheckpointManager", "Progress", "Saved"]

log = logging.getLogger(__name__)

SET_ASIDE = "set-aside-"
REMOVED = ".removed-"
# The manifest, and what the file system needs for itself.
ROOM_BYTES = 2**20
LONG_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Saved:
    """How one checkpoint went.  Times in seconds."""

    step: int
    path: Path | None
    """None if it could not be written."""
    errors: list[str]
    """Why not."""
    bytes: int
    """Of all ranks."""
    waited: float
    """Training stood still until the one before was written."""
    paused: float
    """Training stood still for the copy to host memory, or for the writing where there was no room for a copy."""
    seconds: float = 0.0
    """From the trigger until it was whole on the disk."""
    notes: list[str] = field(default_factory=list)
    """What went wrong afterwards, with older ones."""


class CheckpointManager:
    """Writes and finds the checkpoints of one run."""

    def __init__(self, run_folder: Path, topology: Topology, retention: Retention | None = None, disk: Disk | None = None):
        self.folder = run_folder / "checkpoints"
        self.topology = topology
        self.retention, self.disk = retention or Retention(), disk or Disk()
        self._writer = CheckpointWriter(self.folder, topology, self.disk)
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._ended: SimpleQueue[Saved] = SimpleQueue()
        # The last checkpoint that was begun, or that the run was resumed from: it is not written twice.
        self._last_step: int | None = None
        self._last: Path | None = None

    def resumed_from(self, checkpoint: Checkpoint) -> None:
        """The run continues from it: there is no need to write it again."""
        if checkpoint.folder.parent.resolve() == self.folder.resolve():
            self._last_step, self._last = checkpoint.progress.step, checkpoint.folder

    # ── saving ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(
        self,
        progress: Progress,
        groups: Mapping[str, Mapping[str, Tensor]],
        scalars: Mapping[str, Mapping[str, Any]],
        record: Mapping[str, Any],
        eval_losses: Mapping[str, float] | None = None,
    ) -> bool:
        """Begin a checkpoint; collective.  When it returns the tensors may change; :meth:`poll` and :meth:`finish` tell the end.

        ``groups``: the tensors that this rank writes, of each kind (``weights``, ``optimizer``, …) by the parameter's name or
        ``<name>::<anything>``.  What other ranks hold too is given by one of them.  ``scalars``: by kind and name what JSON can
        hold of this rank's share.  ``record``: JSON values that the run wants back (settings, seed, what the data was).
        ``eval_losses``: held-out loss by dataset, if it was measured at this step.

        Nothing happens, and False is returned, if this step's checkpoint is there already.
        """
        began = time.monotonic()
        waited = self._wait()
        if progress.step == self._last_step and self.finish():
            return False
        self._last_step, self._last = progress.step, None
        mine = {
            "bytes": sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values()),
            "growth": self._copy.growth(groups),
            "host": socket.gethostname(),
            "free": self._free_bytes(),
            "token": secrets.token_hex(4),
        }
        everywhere = self.topology.gather(mine)
        size, free = sum(rank["bytes"] for rank in everywhere), everywhere[0]["free"]
        saved = Saved(progress.step, None, [], size, waited, 0.0)
        if free is not None and free < size + ROOM_BYTES:
            room = f"{_megabytes(size + ROOM_BYTES)} are needed in {self.folder}, {_megabytes(free)} are free"
            self._end(replace(saved, errors=[f"the disk has no room: {room}; remove something, or keep fewer (keep_last)"]), began)
            return True

        # Ranks of one machine share its memory.
        growth = sum(rank["growth"] for rank in everywhere if rank["host"] == mine["host"])
        has_room = growth == 0 or (growth <= available_host_bytes() and self._copy.make_room(groups))
        contents = self._copy.take(groups) if has_room else live_contents(groups)
        job = Job(progress, everywhere[0]["token"], contents, scalars, record, eval_losses or {})
        if has_room:
            saved = replace(saved, paused=time.monotonic() - began - waited)
            self._thread = threading.Thread(target=self._write, args=(job, saved, began), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            log.warning("no host memory for a copy of %s: training stands still until it is written", _megabytes(mine["bytes"]))
            self._write(job, saved, began)
        return True

    def poll(self) -> list[Saved]:
        """What has ended since the last call, on rank 0; it never waits."""
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def finish(self) -> Path | None:
        """Wait until what was begun is written; collective.  The last checkpoint begun, or None if it failed."""
        self._wait()
        return self.topology.broadcast(self._last)

    def _wait(self) -> float:
        began = time.monotonic()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        waited = time.monotonic() - began
        if waited > LONG_WAIT_SECONDS:
            log.info("training stood still for %.1f s, until the checkpoint of step %s was written", waited, self._last_step)
        return waited

    def _free_bytes(self) -> int | None:
        try:
            return self.disk.free_bytes(self.folder)
        except OSError:
            return None  # the writing will tell what is wrong

    def _write(self, job: Job, saved: Saved, began: float) -> None:
        """Beside training, in a thread."""
        errors = self._writer.write(job)
        path = self.folder / job.name if self.topology.is_main and not errors else None
        self._end(replace(saved, path=path, errors=errors), began)

    def _end(self, saved: Saved, began: float) -> None:
        if not self.topology.is_main:
            return
        notes = self._remove_old() if saved.path else []
        self._last = saved.path
        self._ended.put(replace(saved, seconds=time.monotonic() - began, notes=notes))

    def _remove_old(self) -> list[str]:
        """Only now, when the new one is whole.  Damaged ones and those that were set aside are the user's to remove."""
        try:
            whole = [checkpoint for checkpoint in self.all() if not checkpoint.problems(quick=True)]
            for checkpoint in self.retention.to_remove(whole):
                self.remove(checkpoint.folder)
        except OSError as error:
            return [f"an older checkpoint could not be removed: {error}"]
        return []

    def remove(self, folder: Path) -> None:
        """Remove a checkpoint or what was left of one.  Raises OSError."""
        # Under another name first, or a stop in the middle would leave what looks like a damaged checkpoint.
        removed = folder if folder.name.startswith(".") else folder.with_name(f"{REMOVED}{folder.name}")
        if removed != folder:
            self.disk.remove_tree(removed)
            self.disk.rename(folder, removed)
            self.disk.sync_folder(self.folder)
        self.disk.remove_tree(removed)

    # ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def all(self) -> list[Checkpoint]:
        """Checkpoint folders by rising step, whole or not."""
        folders = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted((Checkpoint(folder) for folder in folders if Checkpoint.is_one(folder)), key=lambda found: found.named_step)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged newer ones are named in the log."""
        for checkpoint in reversed(self.all()):
            problems = checkpoint.problems()
            if not problems:
                return checkpoint
            log.warning("%s", listed(problems, f"checkpoint {checkpoint.folder.name} is damaged and is passed over:"))
        return None

    def at(self, folder: Path) -> Checkpoint:
        """The checkpoint that the user named.  Raises UserError if it is not whole."""
        checkpoint = Checkpoint(folder)
        if not folder.is_dir():
            raise UserError(f"--resume {folder}: there is no such folder; checkpoints are in {self.folder}")
        problems = checkpoint.problems()
        if problems:
            newest = self.latest()
            way_out = f"the newest whole one is {newest.folder}" if newest else "there is no whole one in this run"
            raise UserError(listed(problems, f"--resume {folder}: this checkpoint is damaged ({way_out}):"))
        return checkpoint

    def leftovers(self) -> list[Path]:
        """What a process that was stopped left half written or half removed."""
        return sorted([*self.folder.glob(f"{PARTIAL}*"), *self.folder.glob(f"{REMOVED}*")])

    def set_aside(self) -> list[Path]:
        """Checkpoints that :meth:`set_aside_others` has put away."""
        return sorted(self.folder.glob(f"{SET_ASIDE}*"))

    # ── at the start of a run ─────────────────────────────────────────────────────────────────────────────────────────────

    def remove_leftovers(self) -> None:
        """At a run's start, when no process of it is writing.  What cannot be removed stays: it is in nobody's way."""
        for folder in self.leftovers():
            with suppress(OSError):
                self.remove(folder)

    def set_aside_others(self, resumed: Checkpoint) -> None:
        """Give checkpoints of later steps another name: they are damaged, or belong to a course that this run leaves.

        Otherwise the run would write beside them, and a later start would take the wrong one for the newest.  Raises UserError.
        """
        for checkpoint in self.all():
            if checkpoint.named_step < resumed.progress.step or checkpoint.folder.resolve() == resumed.folder.resolve():
                continue
            aside = self._unused(checkpoint.folder.with_name(f"{SET_ASIDE}{checkpoint.folder.name}"))
            try:
                self.disk.rename(checkpoint.folder, aside)
                self.disk.sync_folder(self.folder)
            except OSError as error:
                raise UserError(f"{checkpoint.folder} is later than what is resumed, and could not be renamed: {error}") from error
            log.warning("%s is later than the checkpoint that is resumed; it is now called %s", checkpoint.folder.name, aside.name)

    @staticmethod
    def _unused(path: Path) -> Path:
        names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(2, 10_000))]
        return next(name for name in names if not name.exists())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
