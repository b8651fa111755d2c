"""Losses: predictions and targets to one fp32 number."""

from torch import Tensor
from torch.nn import functional


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements, computed in fp32 whatever the dtype of the prediction."""
    return functional.mse_loss(prediction.float(), target.float())
