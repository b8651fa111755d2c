"""The noise path against diffusers' scheduler."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from utils.diffusion.paths import flow_path


def test_it_is_the_path_of_the_flow_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(20)
    latents, noise = torch.randn(2, 1, 16, 3, 4, 4)
    for index in (0, 7, 19):
        path = flow_path(latents, noise, float(scheduler.sigmas[index]))
        expected = scheduler.scale_noise(latents, scheduler.timesteps[index : index + 1], noise)
        assert torch.allclose(path.noisy, expected, atol=1e-6)
        # The scheduler steps along the velocity: from here to the next sigma it must stay on the path.
        scheduler._step_index = index
        stepped = scheduler.step(path.velocity, scheduler.timesteps[index], expected).prev_sample
        following = flow_path(latents, noise, float(scheduler.sigmas[index + 1])).noisy
        assert torch.allclose(stepped, following, atol=1e-5)


def test_low_precision_latents_are_mixed_in_fp32():
    latents, noise = torch.randn(2, 8).bfloat16(), torch.randn(2, 8)
    path = flow_path(latents, noise, 0.3)
    assert path.noisy.dtype is torch.float32
    assert torch.equal(path.velocity, noise - latents.float())
