"""Writing a checkpoint: each rank its own files, then rank 0 the manifest and the name.

The ranks do not use the collectives of training, which go on meanwhile: each leaves a report where rank 0 finds it.  Everything is
written to a folder under another name, synced, and renamed last: a checkpoint is there whole or not at all.
"""

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.checkpoints.checkpoint import FORMAT_VERSION, MANIFEST, Progress, checkpoint_name, file_name, sealed
from utils.checkpoints.disk import Disk
from utils.checkpoints.host_copy import FileContent
from utils.topology import Topology

PARTIAL = ".partial-"
PIECE_BYTES = 4 * 2**20
# A rank's share may be many GB on a slow file system; one that is dead ends the run by other ways, long before.
REPORT_MINUTES = 60
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """One checkpoint, as one rank sees it."""

    progress: Progress
    token: str
    """Differs for each attempt of each process, so that nothing of another one is met."""
    contents: Mapping[str, FileContent]
    """This rank's file of each kind."""
    scalars: Mapping[str, Mapping[str, Any]]
    """By kind: what of this rank's share is no tensor."""
    record: Mapping[str, Any]
    eval_losses: Mapping[str, float]

    @property
    def name(self) -> str:
        return checkpoint_name(self.progress.step)

    def report_key(self, rank: int) -> str:
        return f"checkpoint/{self.token}/{rank}"


class CheckpointWriter:
    """Writes the checkpoints of a run into ``folder``.  Used by one thread at a time, not by that of training."""

    def __init__(self, folder: Path, topology: Topology, disk: Disk):
        self.folder, self.topology, self.disk = folder, topology, disk

    def write(self, job: Job) -> list[str]:
        """Write this rank's share; on rank 0 wait for the others' and make them a checkpoint.  Returns why there is none.

        On other ranks the result is rank 0's to know, and the list is empty.
        """
        report = self._write_share(job)
        if not self.topology.is_main:
            self.topology.post(job.report_key(self.topology.rank), json.dumps(report))
            return []
        reports = [report, *self._reports_of_others(job)]
        errors = list(dict.fromkeys(report["error"] for report in reports if "error" in report))
        if not errors:
            errors = self._commit(job, reports)
        if errors:
            with suppress(OSError):  # it is removed at the next start, or by `prune`
                self.disk.remove_tree(self._partial(job))
        return errors

    def _partial(self, job: Job) -> Path:
        return self.folder / f"{PARTIAL}{job.token}-{job.name}"

    def _write_share(self, job: Job) -> dict[str, Any]:
        """What the manifest says of this rank's files, or the error that stood against them."""
        where = f"rank {self.topology.rank} (stage {self.topology.stage})"
        try:
            partial = self._partial(job)
            self.disk.make_folder(partial)
            files = {}
            for kind, content in job.contents.items():
                name = file_name(kind, self.topology.stage, self.topology.replica)
                files[name] = self._write_file(partial / name, content)
            self.disk.sync_folder(partial)
        except Exception as error:  # whatever it is, it costs this checkpoint and not the run
            return {"error": f"{where}: {_described(error)}"}
        return {"files": files, "scalars": job.scalars}

    def _write_file(self, path: Path, parts: FileContent) -> dict[str, Any]:
        """Size and checksum, both of what was handed over: nothing is read back."""
        digest, size = hashlib.sha256(), 0
        with self.disk.create(path) as file:
            for part in parts:
                for start in range(0, len(part), PIECE_BYTES):
                    piece = memoryview(part)[start : start + PIECE_BYTES]
                    digest.update(piece)
                    self.disk.write(file, piece)
                    size += len(piece)
            self.disk.sync(file)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def _reports_of_others(self, job: Job) -> list[dict[str, Any]]:
        reports = []
        deadline = time.monotonic() + 60 * REPORT_MINUTES
        for rank in range(1, self.topology.world_size):
            while (text := self.topology.collect(job.report_key(rank))) is None:
                if time.monotonic() > deadline:
                    return [*reports, {"error": f"rank {rank} has not written its share within {REPORT_MINUTES} minutes"}]
                time.sleep(POLL_SECONDS)
            reports.append(json.loads(text))
        return reports

    def _commit(self, job: Job, reports: list[dict[str, Any]]) -> list[str]:
        partial, final = self._partial(job), self.folder / job.name
        scalars: dict[str, dict[str, Any]] = {}
        for report in reports:
            for kind, values in report["scalars"].items():
                scalars.setdefault(kind, {}).update(values)
        manifest = {
            "version": FORMAT_VERSION,
            "progress": asdict(job.progress),
            "files": {name: entry for report in reports for name, entry in report["files"].items()},
            "scalars": scalars,
            "record": job.record,
            "eval_losses": job.eval_losses,
            "written_at": time.time(),
            "written_by": {
                "stages": self.topology.stages,
                "replicas": self.topology.replicas,
                **_versions(),
            },
        }
        try:
            self._write_file(partial / MANIFEST, [sealed(manifest).encode()])
            self.disk.sync_folder(partial)
            if final.exists():
                return [f"there is a checkpoint {final} already"]
            self.disk.rename(partial, final)
        except Exception as error:  # as above
            return [_described(error)]
        try:
            self.disk.sync_folder(self.folder)
        except OSError as error:
            return [f"it is there, but would perhaps not outlive a failure of the machine: {_described(error)}"]
        return []


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed", "diffusers", "peft")}}


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
