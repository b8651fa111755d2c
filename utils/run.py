"""The run's folder, and which checkpoint it continues from."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.checkpoints.manager import Checkpoint, CheckpointManager
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.topology import Topology


@dataclass(frozen=True)
class RunFolder:
    """``output_dir/run_name`` and where the run starts in it."""

    path: Path
    resumed: Path | None
    """The checkpoint that is continued, found whole; None for a new run."""

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.path / "exports"


def open_run(config: RunConfig, resume: str | None, topology: Topology, refuse: Callable[[Checkpoint], None]) -> RunFolder:
    """Make or find the run's folder; collective.

    ``resume``: the value of ``--resume`` (``latest`` or a checkpoint's folder), which goes before the config's.  ``refuse`` raises
    UserError for a checkpoint that this config cannot continue; then nothing in the folder is changed.
    Raises UserError if the folder cannot be written, or if what is there and what is asked for do not fit.
    """
    return topology.from_main(lambda: _open(config, resume or config.resume, topology, refuse))


def _open(config: RunConfig, resume: str, topology: Topology, refuse: Callable[[Checkpoint], None]) -> RunFolder:
    named = Path(resume)
    is_path = resume not in ("never", "latest", "latest-or-new")
    if is_path and config.run_name is None:
        # A checkpoint lies in run/checkpoints/step-…: the run is known from it.
        folder = named.resolve().parent.parent
    elif config.run_name is None:
        if resume != "never":
            raise UserError(f"resume = {resume!r} needs run_name: without it, it is not known which run to continue")
        folder = config.output_dir / time.strftime("%Y-%m-%d_%H-%M-%S")
    else:
        folder = config.output_dir / config.run_name

    manager = CheckpointManager(folder, topology)
    if resume == "never":
        if manager.all():
            raise UserError(
                f"the run {folder} has checkpoints already; start with --resume to continue it, "
                'set resume = "latest-or-new", or choose another run_name'
            )
        checkpoint = None
    else:
        checkpoint = manager.at(named) if is_path else manager.latest()
        if checkpoint is None and (resume == "latest" or manager.all()):
            state = "none of its checkpoints is whole" if manager.all() else "it has no checkpoint"
            raise UserError(
                f"resume = {resume!r}: the run {folder} cannot be continued: {state}; start it anew under another run_name"
            )
    if checkpoint is not None:
        refuse(checkpoint)
    _make_writable(folder)
    if checkpoint is not None:
        manager.set_aside_others(checkpoint)
    manager.remove_leftovers()
    for leftover in (folder / "exports").glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return RunFolder(folder, checkpoint.folder if checkpoint else None)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir: the run's folder {folder} cannot be written ({error.strerror}); choose another output_dir"
        ) from None


def load_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The checkpoint to continue from, on every rank; it was verified when the run was opened."""
    return Checkpoint(run.resumed) if run.resumed else None
