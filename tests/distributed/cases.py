"""Trainings that ``engine_worker`` runs: all of one number of processes in one start, the first time one of them is asked for.

Those that continue another one's checkpoint have a start of their own, after it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.harness import run_world


@dataclass(frozen=True)
class Case:
    """One small training of a tiny model."""

    variant: str
    family: str = "wan"
    adapter: Mapping[str, object] | None = None
    optimizer: Mapping[str, object] = field(default_factory=lambda: {"type": "sgd", "lr": 0.5})
    options: Mapping[str, object] = field(default_factory=dict)
    """Further keys of ``[model]``."""
    stages: int = 1
    replicas: int = 1
    steps: int = 3
    gradient_clipping: float = 0.0
    activation_checkpointing: bool = False
    resume_at: int | None = None
    """After so many steps a checkpoint is written, everything is built anew, and the training goes on from it."""
    saves: bool = False
    """Write a checkpoint at the end."""
    continues: str | None = None
    """The case whose last checkpoint this one begins with; that one does not continue another."""
    ema: Mapping[str, object] | None = None
    uneven: bool = False
    """Micro-batches of one and of two samples, which have masks and weights."""

    @property
    def processes(self) -> int:
        return self.stages * self.replicas

    @property
    def start(self) -> str:
        """Cases of the same are run together."""
        return f"{self.processes}-processes" + ("-continued" if self.continues else "")

    def settings(self, model: Path, continues: Path | None) -> dict:
        return {
            "model": {"type": self.family, "path": str(model), "dtype": "float32", **self.options},
            "adapter": self.adapter and dict(self.adapter),
            "optimizer": dict(self.optimizer),
            "stages": self.stages,
            "steps": self.steps,
            "gradient_clipping": self.gradient_clipping,
            "activation_checkpointing": self.activation_checkpointing,
            "resume_at": self.resume_at,
            "saves": self.saves,
            "continues": continues and str(continues),
            "ema": self.ema and dict(self.ema),
            "uneven": self.uneven,
        }


@dataclass(frozen=True)
class Result:
    """What a training left, of all its stages."""

    steps: list[tuple[str, str, bool]]
    """(loss, gradient norm, applied) of each step, the numbers as hexadecimal text: equal text is equal bits."""
    held_out: list[str]
    gradients: dict[str, Tensor]
    """Of the first step, clipped."""
    weights: dict[str, Tensor]

    @property
    def losses(self) -> list[float]:
        return [float.fromhex(loss) for loss, _, _ in self.steps]

    @property
    def norms(self) -> list[float]:
        return [float.fromhex(norm) for _, norm, _ in self.steps]


def selected(request: pytest.FixtureRequest) -> list[dict[str, object]]:
    """The parameters of the tests of this module that are going to run."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [item.callspec.params for item in items]


class Cases:
    """Results by name of the case."""

    def __init__(self, cases: Mapping[str, Case], folder: Path, tiny: Callable[[str], Path]):
        self.cases, self.folder, self.tiny = dict(cases), folder, tiny
        self._failed: dict[str, AssertionError | None] = {}

    def settings(self, name: str) -> dict:
        case = self.cases[name]
        return case.settings(self.tiny(case.variant), case.continues and self.folder_of(case.continues))

    def folder_of(self, name: str) -> Path:
        return self.folder / self.cases[name].start / name

    def __getitem__(self, name: str) -> Result:
        self._run(self.cases[name].start)
        folder = self.folder_of(name)
        if not (folder / "results.json").is_file() and (error := self._failed[self.cases[name].start]):
            raise error
        report = json.loads((folder / "results.json").read_text())
        tensors = {
            kind: {key: value for file in folder.glob(f"{kind}-*.safetensors") for key, value in load_file(file).items()}
            for kind in ("gradients", "weights")
        }
        return Result([tuple(step) for step in report["steps"]], report["held_out"], **tensors)

    def _run(self, start: str) -> None:
        """Once."""
        if start in self._failed:
            return
        together = {name: case for name, case in self.cases.items() if case.start == start}
        for continued in {self.cases[case.continues].start for case in together.values() if case.continues}:
            self._run(continued)
        for name in together:
            self.folder_of(name).mkdir(parents=True, exist_ok=True)
            (self.folder_of(name) / "settings.json").write_text(json.dumps(self.settings(name)))
        folder, processes = self.folder / start, next(iter(together.values())).processes
        try:
            run_world(["-m", "tests.distributed.engine_worker", folder], processes, folder, timeout=900)
            self._failed[start] = None
        except AssertionError as error:
            self._failed[start] = error
