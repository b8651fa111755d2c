"""Losses against torch's own, and what masks and weights do."""

import pytest
import torch
from torch.nn import functional

from utils.diffusion.losses import LOSSES, averaged

PREDICTION, TARGET = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mse", lambda a, b, delta: functional.mse_loss(a, b)),
        ("huber", lambda a, b, delta: 2 * functional.huber_loss(a, b, delta=delta)),
        ("smooth_l1", lambda a, b, delta: 2 * functional.smooth_l1_loss(a, b, beta=delta)),
        ("pseudo_huber", lambda a, b, delta: (2 * delta * (torch.hypot(a - b, torch.tensor(delta)) - delta)).mean()),
    ],
)
def test_each_loss_is_that_of_torch(name, reference):
    found = averaged(PREDICTION, TARGET, LOSSES[name](0.3))
    assert float(found) == pytest.approx(float(reference(PREDICTION, TARGET, 0.3)), rel=1e-5)


def test_all_losses_are_the_square_near_zero():
    small = 1e-3 * torch.ones(4)
    for name, make in LOSSES.items():
        scale = 0.5 if name == "smooth_l1" else 1.0
        assert torch.allclose(make(0.5)(small) * scale, small.square(), rtol=1e-2), name


def test_a_mask_counts_its_area_alone():
    mask = torch.zeros(3, 1, 5, 6)
    mask[0, :, :2] = 1
    mask[1] = 0.5
    found = averaged(PREDICTION, TARGET, mask=mask)
    first = (PREDICTION[0, :, :2] - TARGET[0, :, :2]).square().mean()
    second = (PREDICTION[1] - TARGET[1]).square().mean()
    assert float(found) == pytest.approx(float((first + second) / 3), rel=1e-5)


def test_weights_multiply_samples():
    weights = torch.tensor([0.0, 1.0, 3.0])
    means = (PREDICTION - TARGET).square().flatten(1).mean(1)
    assert float(averaged(PREDICTION, TARGET, weights=weights)) == pytest.approx(float((means * weights).mean()), rel=1e-5)


def test_low_precision_is_computed_in_fp32():
    found = averaged(PREDICTION.bfloat16(), TARGET.bfloat16())
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(float(functional.mse_loss(PREDICTION.bfloat16().float(), TARGET.bfloat16().float())))
