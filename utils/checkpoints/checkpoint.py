"""A checkpoint on the disk: everything that a run needs to continue exactly, by name.

It is a folder ``checkpoints/step-00000012`` with safetensors files ``<kind>-<stage>-<replica>.safetensors`` (kinds are ``weights``,
``optimizer``, …; each rank writes what it alone holds) and ``manifest.json`` with the progress, the settings, the scalars of each
kind and a checksum of each file.  Tensors are known by the names of the parameters, so any number of ranks reads what any other
wrote.  Frozen weights are not in it.

Format 1, which is still read, had the optimizer's scalars under ``optimizer``, file names without a replica, and no checksum of the
manifest itself.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from utils.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
HASH_THREADS = 4
_NAME = re.compile(r"step-(\d{8,})")


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
    unfinished: tuple[str, ...] = ()
    """What was due after the last step and is still to be done, as the run was stopped: ``evaluation``, ``export``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unfinished", tuple(self.unfinished))  # JSON has lists

    @property
    def epochs_begun(self) -> int:
        """The epoch that the last step belongs to, counted from 1."""
        return self.epoch + (1 if self.epoch_samples else 0)

    def after_step(self, samples: int, epoch_is_over: bool) -> "Progress":
        advanced = replace(self, step=self.step + 1, samples=self.samples + samples, unfinished=())
        if epoch_is_over:
            return replace(advanced, epoch=self.epoch + 1, epoch_samples=0)
        return replace(advanced, epoch_samples=self.epoch_samples + samples)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def file_name(kind: str, stage: int, replica: int) -> str:
    return f"{kind}-{stage:03d}-{replica:03d}.safetensors"


def kind_of(file: str) -> str:
    return file.partition("-")[0]


def sealed(manifest: Mapping[str, Any]) -> str:
    """A manifest as the file's text, with a checksum of itself."""
    plain = json.loads(json.dumps(manifest))  # what a reader will see: tuples as lists, names as text
    return json.dumps({"checksum": _checksum(plain), **plain}, indent=1)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class Checkpoint:
    """One checkpoint folder and its manifest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._manifest: dict[str, Any] | None = None

    @staticmethod
    def is_one(folder: Path) -> bool:
        """By its name: it may be damaged."""
        return _NAME.fullmatch(folder.name) is not None and folder.is_dir()

    @property
    def named_step(self) -> int:
        """The step in the folder's name, which is there even if the manifest is not."""
        return int(_NAME.fullmatch(self.folder.name)[1])

    @property
    def manifest(self) -> dict[str, Any]:
        """As read the first time.  Only :meth:`problems` tells whether it is what was written."""
        if self._manifest is None:
            self._manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return self._manifest

    def problems(self, quick: bool = False) -> list[str]:
        """Why it cannot be used: nothing if it is whole.  Reads every byte of it, or with ``quick`` the manifest and the sizes."""
        try:
            self._manifest = None
            found = self.manifest["version"]
            if found > FORMAT_VERSION:
                return [f"{MANIFEST}: written by a newer flowstage (format {found}, this one reads up to {FORMAT_VERSION})"]
            body = {key: value for key, value in self.manifest.items() if key != "checksum"}
            if found > 1 and self.manifest["checksum"] != _checksum(body):
                return [f"{MANIFEST} does not have the content it was written with"]
            files = {name: (entry["bytes"], entry["sha256"]) for name, entry in self.manifest["files"].items()}
            Progress(**self.manifest["progress"])
        except FileNotFoundError:
            return [f"{MANIFEST} is missing"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{MANIFEST} cannot be read: {error}"]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            found_problems = pool.map(lambda name: self._problem(name, *files[name], quick), files)
        return [problem for problem in found_problems if problem]

    def _problem(self, name: str, size: int, sha256: str, quick: bool) -> str | None:
        path = self.folder / name
        if Path(name).name != name:
            return f"{name!r} is no name of a file in a checkpoint"
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if quick:
                return None
            with path.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return None if same else f"{name} does not have the content it was written with"

    @property
    def progress(self) -> Progress:
        return Progress(**self.manifest["progress"])

    @property
    def record(self) -> dict[str, Any]:
        return self.manifest["record"]

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @property
    def eval_loss(self) -> float | None:
        """Held-out loss at this step, the mean over the eval datasets; None if it was not measured there."""
        losses = self.manifest.get("eval_losses") or {}
        return sum(losses.values()) / len(losses) if losses else None

    def kinds(self) -> list[str]:
        """What there are tensors of: ``weights``, ``optimizer``, …"""
        return list(dict.fromkeys(kind_of(file) for file in self.manifest["files"]))

    def tensors(self, kind: str, names: Iterable[str]) -> dict[str, Tensor]:
        """The kind's tensors that belong to these parameters: ``<name>`` and ``<name>::<anything>``.  A missing one is left out."""
        wanted = set(names)
        tensors = {}
        for file in self.manifest["files"]:
            if kind_of(file) == kind:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118  (not a dict)
                        if key.partition("::")[0] in wanted:
                            tensors[key] = opened.get_tensor(key)
        return tensors

    def scalars(self, kind: str) -> dict[str, Any]:
        """The kind's values that are no tensors, of all ranks together."""
        if self.manifest["version"] == 1:
            return self.manifest["optimizer"] if kind == "optimizer" else {}
        return self.manifest["scalars"].get(kind, {})

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Trained weights of these names.  Raises UserError if one is missing."""
        names = list(names)
        found = self.tensors("weights", names)
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"the checkpoint {self.folder} holds no weight {missing[0]!r} ({len(missing)} are missing)")
        return found

    def optimizer(self, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer state of these parameters: tensors and scalars."""
        return self.tensors("optimizer", names), self.scalars("optimizer")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Nested settings that differ: (dotted key, value before, value now), None where there is none."""
    flat_before, flat_now = _flat(before), _flat(now)
    keys = [key for key in {**flat_before, **flat_now} if flat_before.get(key) != flat_now.get(key)]
    return [(key, flat_before.get(key), flat_now.get(key)) for key in keys]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
