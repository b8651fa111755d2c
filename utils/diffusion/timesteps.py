"""Timesteps t in [0, 1] (1 is pure noise) as quantile functions: a place in (0, 1) in, a timestep out.

A quantile function instead of a random draw keeps this module pure: who draws the quantile, and from which seed, is decided
elsewhere; evaluation hands in fixed ones.  Everything is computed in fp64 on Python numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()


@dataclass(frozen=True)
class BaseDistribution:
    """A distribution on (0, 1) before the shift."""

    quantile: Callable[[float, float], float]
    """(place, scale) -> t"""
    cumulative: Callable[[float, float], float]
    """(t, scale) -> place"""


def _logit_normal_quantile(place: float, scale: float) -> float:
    return 1 / (1 + math.exp(-scale * _NORMAL.inv_cdf(place)))


def _logit_normal_cumulative(t: float, scale: float) -> float:
    return _NORMAL.cdf(math.log(t / (1 - t)) / scale) if 0 < t < 1 else float(t >= 1)


def _mode_quantile(place: float, scale: float) -> float:
    u = 1 - place
    return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)


def _mode_cumulative(t: float, scale: float) -> float:
    """By bisection: the quantile function rises for -1 <= scale <= 2 / (pi - 2), and has no inverse in closed form."""
    low, high = 0.0, 1.0
    for _ in range(60):  # 2^-60 is below the resolution of fp64
        middle = (low + high) / 2
        low, high = (middle, high) if _mode_quantile(middle, scale) < t else (low, middle)
    return (low + high) / 2


BASE_DISTRIBUTIONS = {
    "uniform": BaseDistribution(quantile=lambda place, scale: place, cumulative=lambda t, scale: t),
    # Esser et al. 2024 (arXiv 2403.03206), section 3.1: t = sigmoid(scale * N(0, 1)).
    "logit_normal": BaseDistribution(quantile=_logit_normal_quantile, cumulative=_logit_normal_cumulative),
    # The same paper: t = 1 - u - s (cos^2(pi u / 2) - 1 + u); s > 0 prefers the middle, s < 0 the ends, s = 0 is uniform.
    "mode": BaseDistribution(quantile=_mode_quantile, cumulative=_mode_cumulative),
    # The same paper, CosMap: t = 1 - 1 / (tan(pi u / 2) + 1), the density that a cosine schedule has in sigma.
    "cosmap": BaseDistribution(
        quantile=lambda place, scale: 1 - 1 / (math.tan(math.pi * place / 2) + 1),
        cumulative=lambda t, scale: 2 / math.pi * math.atan2(t, 1 - t),
    ),
}


def shifted(t: float, shift: float) -> float:
    """t' = s t / (1 + (s - 1) t)  (Esser et al. 2024, equation 23, with s = sqrt(m / n))."""
    return shift * t / (1 + (shift - 1) * t)


def unshifted(t: float, shift: float) -> float:
    """The inverse of :func:`shifted`: the shift by 1 / s."""
    return shifted(t, 1 / shift)


def resolution_shift(tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """Shift that grows with the picture: s = exp(mu), mu on the line through two points (tokens, mu).

    The defaults are FLUX.1's (``calculate_shift`` of diffusers' FluxPipeline); each family has its own.
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


@dataclass(frozen=True)
class TimestepDistribution:
    """A base distribution, shifted, and cut to [low, high] by slicing: inside, its density keeps its form."""

    method: str
    scale: float = 1.0
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def at(self, place: float) -> float:
        """The timestep at a quantile in (0, 1) of the cut distribution."""
        base = BASE_DISTRIBUTIONS[self.method]
        start, stop = (base.cumulative(unshifted(edge, self.shift), self.scale) for edge in (self.low, self.high))
        inside = start + place * (stop - start)
        # Rounding at the far tails may reach 0 or 1, where the inverse of the normal has no value.
        inside = min(max(inside, 1e-12), 1 - 1e-12)
        return min(max(shifted(base.quantile(inside, self.scale), self.shift), self.low), self.high)
