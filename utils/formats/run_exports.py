"""Exports of a run: the stages' shares are put together to files for other programs."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from utils.checkpoints.disk import Disk
from utils.errors import UserError
from utils.topology import Topology
from utils.weights.named import NamedWeights, save_safetensors
from utils.weights.tensor_files import SafetensorsFile

log = logging.getLogger(__name__)

WriteExport = Callable[[Path, str, Mapping[str, Tensor], Mapping[str, Any]], None]
"""(folder, beginning of the files' names, weights by canonical name, facts of the training): writes one file or several."""
Value = TypeVar("Value")


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


class Under(Mapping[str, Value]):
    """What a mapping holds under names that begin with ``prefix``, by the names without it; each is asked for when it is wanted."""

    def __init__(self, prefix: str, values: Mapping[str, Value]):
        self._prefix, self._values = prefix, values
        self._names = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Value:
        return self._values[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WeightsOfFiles(Mapping[str, Tensor]):
    """Weights that are not trained, each read from the model's files when it is asked for."""

    def __init__(self, base: NamedWeights, names: Iterable[str]):
        self._base, self._names = base, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._base.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RunExporter:
    """Collects the trained weights of all stages and has them written."""

    def __init__(self, folder: Path, run_name: str, topology: Topology, write: WriteExport):
        self.folder, self.run_name, self.topology, self.write = folder, run_name, topology, write

    def export(self, name: str, weights: Mapping[str, Tensor], training: Mapping[str, Any], suffix: str = "") -> Path | None:
        """Write the files of an export into ``<folder>/<name>`` and return that folder; collective.

        ``weights``: this stage's share.  Each stage writes its share to a file first, so that no rank ever holds more than its own.
        ``suffix`` stands after the run's name in the files', for those of other weights beside them.
        None if a file could not be written: then none is there.  That costs this export, with a loud message, and not the run.
        """
        partial = self.folder / f".partial-{name}{suffix}"
        errors = [error for error in self.topology.gather(self._write_share(partial, weights)) if error]
        written: list[str] = []
        if not errors and self.topology.is_main:
            written, errors = self._put_together(partial, name, self.run_name + suffix, training)
        written, errors = self.topology.broadcast((written, errors))
        if self.topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if errors:
            log.error("export %s was NOT written, training goes on: %s", name, "; ".join(errors))
            return None
        log.info("export %s: %s", self.folder / name, ", ".join(written))
        return self.folder / name

    def _write_share(self, partial: Path, weights: Mapping[str, Tensor]) -> str | None:
        if not self.topology.writes_weights:
            return None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_safetensors(partial / f"stage-{self.topology.stage:03d}.safetensors", weights)
        except OSError as error:
            return f"stage {self.topology.stage}: {error}"
        return None

    def _put_together(self, partial: Path, name: str, file_name: str, training: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Names of the files, and what went wrong."""
        try:
            whole, final = partial / name, self.folder / name
            shutil.rmtree(whole, ignore_errors=True)  # of a run that was killed here
            whole.mkdir()
            shares = [partial / f"stage-{stage:03d}.safetensors" for stage in range(self.topology.stages)]
            self.write(whole, file_name, TensorsOnDisk(shares), training)
            files = sorted(file.name for file in whole.iterdir())
            if not final.exists():
                whole.rename(final)  # all files in one moment
            else:
                for file in files:
                    (whole / file).replace(final / file)
            Disk().sync_folder(self.folder)
            return files, []
        except (OSError, UserError) as error:
            return [], [str(error)]
