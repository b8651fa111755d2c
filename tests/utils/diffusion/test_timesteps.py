"""Timestep distributions against sampling with torch, and their slices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.diffusion.timesteps import TimestepDistribution, shifted, unshifted

PLACES = [(index + 0.5) / 4000 for index in range(4000)]


def at(distribution: TimestepDistribution) -> torch.Tensor:
    return torch.tensor([distribution.at(place) for place in PLACES], dtype=torch.float64)


def test_logit_normal_is_the_sigmoid_of_a_scaled_normal():
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = torch.sigmoid(1.3 * normal.icdf(torch.tensor(PLACES, dtype=torch.float64)))
    assert torch.allclose(at(TimestepDistribution("logit_normal", scale=1.3)), expected, atol=1e-9)


def test_shift_is_that_of_the_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    ours = [shifted(index / 1000, 3.0) for index in range(1000, 0, -1)]
    assert torch.allclose(scheduler.sigmas[:1000], torch.tensor(ours), atol=1e-6)


@given(t=st.floats(0, 1), shift=st.floats(0.05, 20))
def test_unshifted_undoes_shifted(t, shift):
    assert unshifted(shifted(t, shift), shift) == pytest.approx(t, abs=1e-9)


@pytest.mark.parametrize("method", ["uniform", "logit_normal"])
def test_a_cut_keeps_the_form_of_the_distribution(method):
    whole = TimestepDistribution(method, scale=1.2, shift=3.0)
    cut = TimestepDistribution(method, scale=1.2, shift=3.0, low=0.3, high=0.9)
    inside = at(whole)
    inside = inside[(inside >= 0.3) & (inside <= 0.9)]
    values = at(cut)
    assert values.min() >= 0.3
    assert values.max() <= 0.9
    # Sliced, not squeezed: the quartiles are those of the values inside.
    for quarter in (0.25, 0.5, 0.75):
        assert float(values.quantile(quarter)) == pytest.approx(float(inside.quantile(quarter)), abs=2e-3)


def test_the_ends_are_finite_and_rising():
    for method in ("uniform", "logit_normal"):
        values = [TimestepDistribution(method, scale=8.0, shift=3.0).at(place) for place in (1e-7, 0.5, 1 - 1e-7)]
        assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)
        assert values == sorted(values)
