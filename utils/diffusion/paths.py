"""Noise paths: from clean latents and noise to the network's input and its target."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NoisePath:
    """A point on the way from data to noise.  Both tensors have the shape of the latents, fp32."""

    noisy: Tensor
    velocity: Tensor


def flow_path(latents: Tensor, noise: Tensor, t: float) -> NoisePath:
    """Straight path of rectified flow (Liu et al. 2022, arXiv 2209.03003): x_t = (1 - t) x_0 + t noise, velocity = noise - x_0."""
    latents, noise = latents.float(), noise.float()
    return NoisePath(noisy=(1 - t) * latents + t * noise, velocity=noise - latents)
