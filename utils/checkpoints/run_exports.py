"""Exports of a run: the stages' shares are put together to one file for other programs."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.checkpoints.tensor_files import SafetensorsFile
from utils.checkpoints.weights import save_safetensors
from utils.errors import UserError
from utils.topology import Topology

log = logging.getLogger(__name__)

WriteExport = Callable[[Path, str, Mapping[str, Tensor], Mapping[str, Any]], Path]
"""(folder, file name without ending, weights by canonical name, facts of the training) -> the file."""


class TensorsOnDisk(Mapping[str, Tensor]):
    """Tensors of several safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path]):
        self._places = {name: file for file in map(SafetensorsFile, files) for name in file.entries}

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class RunExporter:
    """Collects the trained weights of all stages and has them written."""

    def __init__(self, folder: Path, run_name: str, topology: Topology, write: WriteExport):
        self.folder, self.run_name, self.topology, self.write = folder, run_name, topology, write

    def export(self, name: str, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> Path | None:
        """Write ``<folder>/<name>/<run name>.safetensors``; collective.

        ``weights``: this stage's share.  Each stage writes its share to a file first, so that no rank ever holds more than its own.
        None if it could not be written: that costs this export, with a loud message, and not the run.
        """
        partial = self.folder / f".partial-{name}"
        errors = [error for error in self.topology.gather(self._write_share(partial, weights)) if error]
        path = None
        if not errors and self.topology.is_main:
            path, errors = self._put_together(partial, name, training)
        path, errors = self.topology.broadcast((path, errors))
        if self.topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if errors:
            log.error("export %s was NOT written, training goes on: %s", name, "; ".join(errors))
            return None
        log.info("export %s", path)
        return path

    def _write_share(self, partial: Path, weights: Mapping[str, Tensor]) -> str | None:
        if not self.topology.writes_weights:
            return None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_safetensors(partial / f"stage-{self.topology.stage:03d}.safetensors", weights)
        except OSError as error:
            return f"stage {self.topology.stage}: {error}"
        return None

    def _put_together(self, partial: Path, name: str, training: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
        try:
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            shares = [partial / f"stage-{stage:03d}.safetensors" for stage in range(self.topology.stages)]
            return self.write(folder, self.run_name, TensorsOnDisk(shares), training), []
        except (OSError, UserError) as error:
            return None, [str(error)]
