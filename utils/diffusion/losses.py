"""Losses: predictions and targets to one fp32 number, element by element and then averaged.

An element-wise loss has the signature ``(difference) -> Tensor`` of the same shape, in fp32.  Averages go over all elements of a
micro-batch; with a mask over its area alone, so that a small area counts as much as a large one; with weights for each sample.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

ElementLoss = Callable[[Tensor], Tensor]


def squared(difference: Tensor) -> Tensor:
    return difference.square()


def huber(difference: Tensor, delta: float) -> Tensor:
    """Quadratic up to ``delta``, linear beyond, with the slope ``2 delta``: scaled so that it is the square near zero."""
    absolute = difference.abs()
    return torch.where(absolute <= delta, difference.square(), delta * (2 * absolute - delta))


def smooth_l1(difference: Tensor, delta: float) -> Tensor:
    """Huber loss divided by ``delta``: linear with slope 2 far away, whatever ``delta`` is."""
    return huber(difference, delta) / delta


def pseudo_huber(difference: Tensor, delta: float) -> Tensor:
    """2 delta^2 (sqrt(1 + (d / delta)^2) - 1): the square near zero, smooth everywhere (Charbonnier et al. 1997)."""
    return 2 * delta**2 * (torch.sqrt(1 + (difference / delta).square()) - 1)


LOSSES: dict[str, Callable[[float], ElementLoss]] = {
    "mse": lambda delta: squared,
    "huber": lambda delta: partial(huber, delta=delta),
    "smooth_l1": lambda delta: partial(smooth_l1, delta=delta),
    "pseudo_huber": lambda delta: partial(pseudo_huber, delta=delta),
}
"""By the name of ``[model] loss``; each takes ``loss_delta``."""


def averaged(
    prediction: Tensor, target: Tensor, element: ElementLoss = squared, *, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Scalar fp32 loss.

    ``mask``: broadcast to the prediction, values in [0, 1]; each sample's loss is divided by its own masked area, and a sample
    whose mask is empty counts nothing.  ``weights`` [B] multiply each sample's mean.
    """
    losses = element(prediction.float() - target.float())
    if mask is None and weights is None:
        return losses.mean()
    losses = losses.flatten(1)
    if mask is None:
        means = losses.mean(1)
    else:
        area = mask.float().expand_as(prediction).flatten(1)
        means = (losses * area).sum(1) / area.sum(1).clamp_min(1e-6)
    return (means if weights is None else means * weights.float()).mean()


def min_snr_weight(snr: float, gamma: float, prediction: Literal["epsilon", "v_prediction"]) -> float:
    """Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556, section 3.4): min(SNR, gamma) / SNR for the noise.

    For the velocity it is min(SNR, gamma) / (SNR + 1).  In both cases an error in the picture that is predicted weighs
    min(SNR, gamma); so a step without any signal has weight 0.
    """
    return min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)


def debiased_weight(snr: float, prediction: Literal["epsilon", "v_prediction"]) -> float:
    """Debiased estimation (Yu et al. 2023, arXiv 2310.08442): 1 / sqrt(SNR) for the noise.

    For the velocity it is 1 / (SNR + 1), and the SNR is cut at 1000, so that the first steps keep a weight (both as in kohya's
    sd-scripts).
    """
    snr = min(snr, 1000.0)
    return 1 / math.sqrt(snr) if prediction == "epsilon" else 1 / (snr + 1)
