"""Checkpoints and exports of a running training: begun, reported when they have ended, and asked for by files."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from utils.checkpoints.checkpoint import Progress, checkpoint_name
from utils.checkpoints.manager import CheckpointManager, Saved
from utils.errors import listed
from utils.formats.run_exports import RunExporter
from utils.metrics import MetricLog
from utils.requests import Requests
from utils.stopping import Wishes
from utils.topology import Topology
from utils.trained import Trained

log = logging.getLogger(__name__)


class RunSaver:
    """What a run leaves on the disk.  Rank 0 tells of it, in the log and the metrics, and looks at the files that ask for it."""

    def __init__(
        self, topology: Topology, checkpoints: CheckpointManager, exporter: RunExporter, metrics: MetricLog, requests: Requests
    ):
        self.topology, self.checkpoints, self.exporter = topology, checkpoints, exporter
        self.metrics, self.requests = metrics, requests
        self.longest_save = 0.0
        """Seconds that a checkpoint took at most, on rank 0."""
        self.longest_export = 0.0
        """Seconds, while training waited."""

    def wishes(self) -> Wishes:
        """What is asked for by files: rank 0 looks for all."""
        return self.requests.look() if self.topology.is_main else Wishes()

    def checkpoint(
        self,
        progress: Progress,
        groups: Mapping[str, Mapping[str, Tensor]],
        scalars: Mapping[str, Mapping[str, Any]],
        record: Mapping[str, Any],
        eval_losses: Mapping[str, float],
    ) -> None:
        """Begin one; it is written beside training.  As :meth:`CheckpointManager.save`."""
        begun = self.checkpoints.save(progress, groups, scalars, record, eval_losses)
        self.requests.begun("checkpoint", progress.step)
        if not begun:
            self.requests.done("checkpoint", progress.step)
        self.report()

    def export(self, name: str, trained: Trained, progress: Progress) -> None:
        """Write the trained weights for other programs, and their average beside them if there is one; collective."""
        began = time.monotonic()
        self.requests.begun("export", progress.step)
        training = {"step": progress.step, "epoch": progress.epochs_begun, "samples": progress.samples}
        written = []
        for suffix in trained.export_suffixes():
            with trained.for_export(suffix) as weights:
                written.append(self.exporter.export(name, weights, training, suffix))
        self.longest_export = max(self.longest_export, time.monotonic() - began)
        self.metrics.event("export", {"step": progress.step, "name": name if all(written) else None})
        self.requests.done("export", progress.step)

    def report(self) -> None:
        """Say how the checkpoints went that have ended since the last call.  Waits for nothing."""
        for saved in self.checkpoints.poll():
            self._report(saved)
            self.requests.done("checkpoint", saved.step)

    def _report(self, saved: Saved) -> None:
        name = checkpoint_name(saved.step)
        if saved.path is None:
            log.error("%s", listed(saved.errors, f"checkpoint {name} was NOT written; older ones stay as they are:"))
        else:
            log.info("checkpoint %s", name)
            self.longest_save = max(self.longest_save, saved.seconds)
        for note in saved.notes:
            log.warning("after checkpoint %s: %s", name, note)
        values = {
            "step": saved.step,
            "name": name if saved.path else None,
            "errors": saved.errors,
            "bytes": saved.bytes,
            "waited_seconds": saved.waited,
            "pause_seconds": saved.paused,
            "seconds": saved.seconds,
        }
        self.metrics.event("checkpoint", values)

    def finish(self) -> None:
        """Wait until what was begun is on the disk; collective."""
        self.checkpoints.finish()
        self.report()

    def finished(self) -> None:
        """The run is at its end, with everything on the disk."""
        if self.topology.is_main:
            self.requests.finished()
