"""Discrete noise schedules of models that were trained as DDPM (Ho et al. 2020, arXiv 2006.11239).

Step 0 of T is nearly clean, step T - 1 nearly (or wholly) noise.  Tables are fp64, so that nothing is lost near their ends.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.diffusion.paths import NoisePath


@dataclass(frozen=True)
class DiscreteSchedule:
    """How much of the picture and how much noise there is at each step."""

    alphas_cumprod: Tensor
    """[T] fp64: the share of the picture in the variance, falling."""

    @classmethod
    def scaled_linear(cls, beta_start: float, beta_end: float, steps: int = 1000) -> "DiscreteSchedule":
        """The square root of beta rises linearly: Stable Diffusion (CompVis latent-diffusion, ``make_beta_schedule``)."""
        betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64).square()
        return cls((1 - betas).cumprod(0))

    def with_zero_terminal_snr(self) -> "DiscreteSchedule":
        """The last step becomes pure noise, the first stays as it is (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
        roots = self.alphas_cumprod.sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        return DiscreteSchedule(roots.square())

    def step(self, t: float) -> int:
        """The step at a timestep in [0, 1]: each has an equal share of the interval."""
        return min(int(t * len(self.alphas_cumprod)), len(self.alphas_cumprod) - 1)

    def snr(self, step: int) -> float:
        """Signal-to-noise ratio: variance of the picture's part over that of the noise."""
        share = float(self.alphas_cumprod[step])
        return share / (1 - share)

    def path(self, latents: Tensor, noise: Tensor, step: int) -> NoisePath:
        """x = sqrt(a) x_0 + sqrt(1 - a) noise, and its velocity sqrt(a) noise - sqrt(1 - a) x_0; shapes as given, fp32.

        Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
        """
        latents, noise = latents.float(), noise.float()
        signal, spread = (math.sqrt(share) for share in (self.alphas_cumprod[step], 1 - self.alphas_cumprod[step]))
        return NoisePath(noisy=signal * latents + spread * noise, velocity=signal * noise - spread * latents)
