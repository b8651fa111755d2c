"""Trainings that ``engine_worker`` runs: all of one number of processes in one start, the first time one of them is asked for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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

    @property
    def processes(self) -> int:
        return self.stages * self.replicas

    def settings(self, model: Path) -> dict:
        return {
            "model": {"type": self.family, "path": str(model), "dtype": "float32", **self.options},
            "adapter": self.adapter and dict(self.adapter),
            "optimizer": dict(self.optimizer),
            "stages": self.stages,
            "steps": self.steps,
            "gradient_clipping": self.gradient_clipping,
            "activation_checkpointing": self.activation_checkpointing,
            "resume_at": self.resume_at,
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


class Cases:
    """Results by name of the case."""

    def __init__(self, cases: Mapping[str, Case], folder: Path, tiny: Callable[[str], Path]):
        self.cases, self.folder, self.tiny = dict(cases), folder, tiny
        self._failed: dict[int, AssertionError | None] = {}

    def settings(self, name: str) -> dict:
        case = self.cases[name]
        return case.settings(self.tiny(case.variant))

    def __getitem__(self, name: str) -> Result:
        processes = self.cases[name].processes
        folder = self.folder / f"{processes}-processes"
        if processes not in self._failed:
            for other, case in self.cases.items():
                if case.processes == processes:
                    (folder / other).mkdir(parents=True, exist_ok=True)
                    (folder / other / "settings.json").write_text(json.dumps(self.settings(other)))
            try:
                run_world(["-m", "tests.distributed.engine_worker", folder], processes, folder, timeout=900)
                self._failed[processes] = None
            except AssertionError as error:
                self._failed[processes] = error
        if not (folder / name / "results.json").is_file() and (error := self._failed[processes]):
            raise error
        report = json.loads((folder / name / "results.json").read_text())
        tensors = {
            kind: {key: value for file in (folder / name).glob(f"{kind}-*.safetensors") for key, value in load_file(file).items()}
            for kind in ("gradients", "weights")
        }
        return Result([tuple(step) for step in report["steps"]], report["held_out"], **tensors)
