"""A small training state whose values tell the step that it is of, and runs of one process that save it."""

from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoints.checkpoint import Checkpoint, Progress
from utils.checkpoints.disk import Disk
from utils.checkpoints.manager import CheckpointManager, Saved
from utils.checkpoints.retention import Retention
from utils.topology import Topology

NAMES = ("blocks.0.to_q.lora_A.weight", "blocks.0.to_q.lora_B.weight")
RECORD = {"settings": {"seed": 7}, "data": "abc"}


def one_process() -> Topology:
    return Topology(0, 1, 1, torch.device("cpu"), {}, {}, None)


def manager(run: Path, retention: Retention | None = None, disk: Disk | None = None) -> CheckpointManager:
    return CheckpointManager(run, one_process(), retention, disk)


def state_of(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, dict]]]:
    """Groups of tensors and of scalars, as a training has them after so many steps."""
    weights = {name: torch.full((3, 4), step + 0.25 * place) for place, name in enumerate(NAMES)}
    moments = {f"{name}::exp_avg": -value for name, value in weights.items()}
    counters = {f"{name}::step": torch.tensor(float(step)) for name in NAMES}
    half = {f"{name}::half": value.to(torch.bfloat16) for name, value in weights.items()}
    return {"weights": weights, "optimizer": moments | counters | half}, {"optimizer": {name: {"step": step} for name in NAMES}}


def save(checkpoints: CheckpointManager, step: int, eval_losses: dict[str, float] | None = None) -> Saved:
    """Save, wait, and say how it went."""
    groups, scalars = state_of(step)
    checkpoints.save(Progress(step, epoch_samples=step, samples=step), groups, scalars, RECORD, eval_losses)
    checkpoints.finish()
    [*_, saved] = checkpoints.poll()
    return saved


def assert_is_of_step(checkpoint: Checkpoint, step: int) -> None:
    """It holds exactly what was saved at this step."""
    assert checkpoint.problems() == []
    groups, scalars = state_of(step)
    assert checkpoint.progress == Progress(step, epoch_samples=step, samples=step)
    assert checkpoint.record == RECORD
    for kind, tensors in groups.items():
        found = checkpoint.tensors(kind, NAMES)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), (name, step)
        assert checkpoint.scalars(kind) == scalars.get(kind, {})
