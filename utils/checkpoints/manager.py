"""Checkpoints: everything that a run needs to continue exactly, by name.

A checkpoint is a folder ``checkpoints/step-00000012`` with, from each stage, one safetensors file of trained weights and one of
optimizer state, and ``manifest.json`` with the progress, the settings, the scalars of the optimizer and a checksum of each file.
Tensors are known by the names of the parameters, so any number of stages reads what any other wrote.  Frozen weights are not in it.

It is written under another name, synced, and renamed last: it is there whole or not at all.  The newest whole one is found by
looking.  A checkpoint that cannot be written costs that checkpoint, with a loud message, and neither an older one nor the run.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from utils.checkpoints.weights import save_safetensors
from utils.errors import UserError, listed
from utils.topology import Topology

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Progress:
    """How far a run is, in numbers that do not depend on stages or replicas."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next sample, from 0."""
    epoch_samples: int = 0
    """Samples of that epoch that were consumed, those that complete a batch included."""
    samples: int = 0
    """Samples consumed in all."""

    @property
    def epochs_begun(self) -> int:
        """The epoch that the last step belongs to, counted from 1."""
        return self.epoch + (1 if self.epoch_samples else 0)

    def after_step(self, samples: int, epoch_is_over: bool) -> "Progress":
        advanced = replace(self, step=self.step + 1, samples=self.samples + samples)
        if epoch_is_over:
            return replace(advanced, epoch=self.epoch + 1, epoch_samples=0)
        return replace(advanced, epoch_samples=self.epoch_samples + samples)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class Checkpoint:
    """One checkpoint folder and its manifest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict[str, Any] = {}

    def read_manifest(self) -> None:
        self.manifest = json.loads((self.folder / MANIFEST).read_text())

    def problems(self) -> list[str]:
        """Why it cannot be used: nothing if it is whole.  Reads every byte of it."""
        path = self.folder / MANIFEST
        try:
            self.read_manifest()
            found = self.manifest["version"]
            if found > FORMAT_VERSION:
                return [f"{path.name}: written by a newer flowstage (format {found}, this one reads up to {FORMAT_VERSION})"]
            files = self.manifest["files"]
            Progress(**self.manifest["progress"])
        except FileNotFoundError:
            return [f"{path.name} is missing"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"{path.name} cannot be read: {error}"]
        problems = []
        for name, expected in files.items():
            file = self.folder / name
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != expected["bytes"]:
                problems.append(f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
            elif _digest(file) != expected:
                problems.append(f"{name} does not have the content it was written with")
        return problems

    @property
    def progress(self) -> Progress:
        return Progress(**self.manifest["progress"])

    @property
    def record(self) -> dict[str, Any]:
        return self.manifest["record"]

    def _tensors(self, kind: str, wanted: Iterable[str] | None) -> dict[str, Tensor]:
        names = None if wanted is None else set(wanted)
        tensors = {}
        for file in self.manifest["files"]:
            if file.startswith(kind):
                with safe_open(self.folder / file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118  (not a dict)
                        if names is None or key.split("::")[0] in names:
                            tensors[key] = opened.get_tensor(key)
        return tensors

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Trained weights of these names.  Raises UserError if one is missing."""
        names = list(names)
        found = self._tensors("weights", names)
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"the checkpoint {self.folder} holds no weight {missing[0]!r} ({len(missing)} are missing)")
        return found

    def optimizer(self, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer state of these parameters: tensors and scalars."""
        return self._tensors("optimizer", names), self.manifest["optimizer"]


class CheckpointManager:
    """Writes and finds the checkpoints of one run."""

    def __init__(self, run_folder: Path, topology: Topology):
        self.folder = run_folder / "checkpoints"
        self.topology = topology

    def save(
        self,
        progress: Progress,
        weights: Mapping[str, Tensor],
        optimizer_tensors: Mapping[str, Tensor],
        optimizer_scalars: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> Path | None:
        """Write a checkpoint of this rank's share; collective.  None if it could not be written, with the reason in the log.

        ``record``: JSON values that the run wants back (settings, seed, what the data was).
        """
        final = self.folder / f"step-{progress.step:08d}"
        partial = self.folder / f"{_PARTIAL}{final.name}"
        reports = self.topology.gather(self._main_prepares(partial))
        if not any(reports):
            reports = self.topology.gather(self._write_share(partial, weights, optimizer_tensors, optimizer_scalars))
        errors = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if isinstance(report, str)]
        if not errors and self.topology.is_main:
            errors = self._finish(partial, final, progress, [report for report in reports if report], record)
        errors = self.topology.broadcast(errors)
        if errors:
            log.error("%s", listed(errors, f"checkpoint {final.name} was NOT written, training goes on:"))
            if self.topology.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            return None
        return final

    def _main_prepares(self, partial: Path) -> str | None:
        if self.topology.is_main:
            try:
                for leftover in self.folder.glob(f"{_PARTIAL}*"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
            except OSError as error:
                return str(error)
        return None

    def _write_share(
        self, partial: Path, weights: Mapping[str, Tensor], optimizer_tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
    ) -> dict[str, Any] | str | None:
        """This stage's files; returns what the manifest says of them, or an error."""
        if not self.topology.writes_weights:
            return None
        try:
            files = {}
            for kind, tensors in (("weights", weights), ("optimizer", optimizer_tensors)):
                path = partial / f"{kind}-{self.topology.stage:03d}.safetensors"
                save_safetensors(path, tensors)
                files[path.name] = _digest(path)
        except OSError as error:
            return f"stage {self.topology.stage}: {error}"
        return {"files": files, "optimizer": scalars}

    def _finish(
        self, partial: Path, final: Path, progress: Progress, shares: list[dict[str, Any]], record: Mapping[str, Any]
    ) -> list[str]:
        manifest = {
            "version": FORMAT_VERSION,
            "progress": asdict(progress),
            "files": {name: entry for share in shares for name, entry in share["files"].items()},
            "optimizer": {name: entry for share in shares for name, entry in share["optimizer"].items()},
            "record": record,
            "written_by": {
                "stages": self.topology.stages,
                "replicas": self.topology.replicas,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "deepspeed", "diffusers", "peft")},
            },
        }
        try:
            with (partial / MANIFEST).open("w") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(partial)
            partial.rename(final)
            _sync_folder(self.folder)
        except OSError as error:
            return [str(error)]
        return []

    def all(self) -> list[Checkpoint]:
        """Checkpoint folders by rising step, whole or not."""
        folders = [folder for folder in self.folder.glob("step-*") if _NAME.fullmatch(folder.name)] if self.folder.is_dir() else []
        return [Checkpoint(folder) for folder in sorted(folders)]

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged newer ones are named in the log."""
        for checkpoint in reversed(self.all()):
            problems = checkpoint.problems()
            if not problems:
                return checkpoint
            log.warning("%s", listed(problems, f"checkpoint {checkpoint.folder.name} is damaged and is passed over:"))
        return None

    def set_aside_after(self, step: int) -> None:
        """Give checkpoints of later steps another name: they are damaged, or belong to a course that this run leaves.

        Otherwise the run would write beside them, and a later start would take the wrong one for the newest.
        """
        for checkpoint in self.all():
            if int(_NAME.fullmatch(checkpoint.folder.name)[1]) > step:
                aside = checkpoint.folder.with_name(f"set-aside-{checkpoint.folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.folder.rename(aside)
                log.warning(
                    "%s is later than the checkpoint that is resumed; it is now called %s", checkpoint.folder.name, aside.name
                )

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
