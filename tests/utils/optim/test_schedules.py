"""The schedules against torch's own, and the ends that a run has."""

from typing import get_args

import pytest
import torch

from utils.config.schema import RunConfig
from utils.optim.schedules import SCHEDULES, learning_rate_factor


def factors(schedule, warmup, total, beyond=0):
    return [
        learning_rate_factor(step, schedule=schedule, warmup_steps=warmup, total_steps=total) for step in range(total + 1 + beyond)
    ]


def test_the_config_knows_every_schedule():
    assert set(SCHEDULES) == set(get_args(RunConfig.model_fields["lr_scheduler"].annotation))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_against_torch(schedule):
    """LinearLR and CosineAnnealingLR give the course after the warm-up, LinearLR the warm-up."""
    warmup, total = 4, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)
    courses = {
        "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=total - warmup),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup),
    }
    torchs = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, courses[schedule]], milestones=[warmup])
    expected = []
    for _ in range(total + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    assert factors(schedule, warmup, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_zero_comes_after_the_last_step(schedule, warmup):
    values = factors(schedule, warmup, 12, beyond=3)
    assert all(value > 0 for value in values[:12])
    assert values[12:] == [0.0] * 4
    assert max(values) == 1.0


def test_the_first_step_of_a_warm_up_moves():
    assert factors("constant", 4, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_a_run_that_ends_in_the_warm_up():
    assert factors("cosine", 10, 3) == pytest.approx([0.1, 0.2, 0.3, 0.4])
