"""The discrete schedule and its weightings against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from utils.diffusion.losses import debiased_weight, min_snr_weight
from utils.diffusion.schedules import DiscreteSchedule

STEPS = (0, 1, 17, 250, 600, 998, 999)


def pair(zero_snr: bool) -> tuple[DiscreteSchedule, DDPMScheduler]:
    ours = DiscreteSchedule.scaled_linear(0.00085, 0.012)
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, rescale_betas_zero_snr=zero_snr
    )
    return ours.with_zero_terminal_snr() if zero_snr else ours, theirs


@pytest.mark.parametrize("zero_snr", [False, True])
def test_it_is_the_scheduler_of_diffusers(zero_snr):
    ours, theirs = pair(zero_snr)
    # diffusers computes in fp32: with zero terminal SNR that costs it digits where little is left of the picture.
    assert torch.allclose(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    latents, noise = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    for step in STEPS:
        at = torch.tensor([step])
        path = ours.path(latents, noise, step)
        assert torch.allclose(path.noisy, theirs.add_noise(latents, noise, at), atol=3e-5)
        assert torch.allclose(path.velocity, theirs.get_velocity(latents, noise, at), atol=3e-5)
        assert ours.snr(step) == pytest.approx(float(compute_snr(theirs, at)), rel=1e-3, abs=1e-9)


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before():
    plain, rescaled = pair(False)[0], pair(True)[0]
    assert rescaled.snr(999) == 0
    assert rescaled.snr(0) == pytest.approx(plain.snr(0), rel=1e-12)
    noise = torch.randn(4, 3, 3)
    path = rescaled.path(torch.ones(4, 3, 3), noise, 999)
    assert torch.equal(path.noisy, noise)
    assert torch.equal(path.velocity, -torch.ones(4, 3, 3))


def test_the_ends_of_the_released_schedule():
    """Signal-to-noise ratios of Stable Diffusion's schedule: sigma from 0.0292 to 14.61."""
    schedule = pair(False)[0]
    assert schedule.snr(0) ** -0.5 == pytest.approx(0.0292, abs=1e-4)
    assert schedule.snr(999) ** -0.5 == pytest.approx(14.61, abs=0.01)


def test_steps_have_equal_shares_of_the_interval():
    schedule = pair(False)[0]
    assert [schedule.step(t) for t in (0.0, 0.0009999, 0.001, 0.5, 0.9995, 1.0)] == [0, 0, 1, 500, 999, 999]


def test_min_snr_is_that_of_the_diffusers_example():
    """``examples/text_to_image/train_text_to_image_sdxl.py``."""
    _, scheduler = pair(False)
    snr = compute_snr(scheduler, torch.tensor(STEPS))
    base = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    for index, value in enumerate(snr.tolist()):
        assert min_snr_weight(value, 5.0, "epsilon") == pytest.approx(float((base / snr)[index]))
        assert min_snr_weight(value, 5.0, "v_prediction") == pytest.approx(float((base / (snr + 1))[index]))
    assert min_snr_weight(0.0, 5.0, "v_prediction") == 0


@pytest.mark.parametrize("snr", [1e-3, 0.4, 7.0, 900.0])
def test_debiased_weights_all_predictions_of_the_noise_alike(snr):
    assert debiased_weight(snr, "epsilon") ** 2 * snr == pytest.approx(1)
    assert debiased_weight(snr, "v_prediction") == pytest.approx(1 / (snr + 1))
    assert debiased_weight(1e6, "epsilon") == debiased_weight(1000.0, "epsilon")
