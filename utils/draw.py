"""Random values that are known by their place, not by a generator that was left running.

A value is a pure function of ``(seed, epoch, sample, occurrence, purpose)``; the generator is made for that one draw and thrown
away.  So two stages make the same noise without sending it, another number of replicas sees the same noise, and a run that is
resumed at any step continues exactly.  All draws are made on the CPU in fp32: the device does not change them.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_from(*parts: int | str) -> int:
    """63-bit seed from the parts, equal on every machine (BLAKE2b; Python's ``hash`` is salted per process)."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator for the place that the parts name."""
    return torch.Generator().manual_seed(seed_from(*parts))


@dataclass(frozen=True)
class Draw:
    """The random values of one run in one epoch.  ``fixed_time`` pins every timestep draw (evaluation)."""

    seed: int
    epoch: int
    fixed_time: float | None = None

    def generator(self, sample: str, purpose: str) -> torch.Generator:
        return generator(self.seed, self.epoch, sample, purpose)

    def normal(self, sample: str, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal fp32 values of ``shape`` for one sample."""
        return torch.randn(shape, generator=self.generator(sample, purpose), dtype=torch.float32)

    def quantile(self, sample: str, purpose: str) -> float:
        """One uniform value in (0, 1): the quantile at which a timestep distribution is read."""
        if self.fixed_time is not None:
            return self.fixed_time
        return float(torch.rand((), generator=self.generator(sample, purpose), dtype=torch.float64).clamp(1e-7, 1 - 1e-7))
