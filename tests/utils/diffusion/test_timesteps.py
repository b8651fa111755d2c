"""Timestep distributions against sampling with torch, and their slices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.diffusion.timesteps import BASE_DISTRIBUTIONS, TimestepDistribution, resolution_shift, shifted, unshifted

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


@pytest.mark.parametrize("method", BASE_DISTRIBUTIONS)
def test_quantile_and_cumulative_undo_each_other(method):
    base = BASE_DISTRIBUTIONS[method]
    for place in (0.001, 0.2, 0.5, 0.77, 0.999):
        assert base.cumulative(base.quantile(place, 1.2), 1.2) == pytest.approx(place, abs=1e-9)


def test_mode_and_cosmap_have_the_densities_of_the_paper():
    """Against the density: the share of an interval is the integral over it."""
    cosmap = at(TimestepDistribution("cosmap"))
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    density = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    assert float((cosmap < 0.3).double().mean()) == pytest.approx(float(torch.trapezoid(density[:30_001], t[:30_001])), abs=1e-3)
    middle = at(TimestepDistribution("mode", scale=1.29))
    ends = at(TimestepDistribution("mode", scale=-0.9))
    assert torch.allclose(at(TimestepDistribution("mode", scale=0.0)), torch.tensor(PLACES, dtype=torch.float64))
    near = [float(((values - 0.5).abs() < 0.1).double().mean()) for values in (middle, ends)]
    assert near[0] > 0.2 > near[1]


def test_resolution_shift_is_that_of_the_flux_pipeline():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (256, 1024, 4096):
        assert resolution_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)))
    assert resolution_shift(4096, (256, 0.5), (8192, 0.9)) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("method", BASE_DISTRIBUTIONS)
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
