"""An exponential moving average (EMA) of the trained weights, which often makes better pictures than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.config.schema import EmaConfig
from utils.errors import UserError
from utils.optim.optimizers import RunOptimizer


class WeightAverage:
    """The average of the weights that are stepped on this rank, in fp32, known by name.

    After each step, average = d * average + (1 - d) * weight.  The n-th step after ``start_step`` has d = min(decay, (1 + n) /
    (10 + n)) with ``ramp`` (as in TensorFlow's ExponentialMovingAverage), so that the first weights are forgotten soon; else
    d = decay.  Up to ``start_step`` the average is the weights.  Where fp32 copies of bf16 weights are kept, it is the average of
    those.
    """

    def __init__(self, optimizer: RunOptimizer, config: EmaConfig):
        """It begins with the weights as they are; they must be filled in by then."""
        self._optimizer, self.config = optimizer, config
        self.updates = 0
        """Steps since the average began."""
        self._averages = {
            name: value.to("cpu" if config.offload else value.device, torch.float32, copy=True)
            for name, value in optimizer.values().items()
        }

    def decay(self) -> float:
        """Of the step that was the last."""
        ramped = (1 + self.updates) / (10 + self.updates)
        return min(self.config.decay, ramped) if self.config.ramp else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After ``step`` steps, counted from 1, the last of which has changed the weights."""
        begun = step > self.config.start_step
        self.updates += begun
        weight = 1 - self.decay() if begun else 1.0
        values = self._optimizer.values()
        at_once = {name: value for name, value in values.items() if _is_like(value, self._averages[name])}
        if at_once:
            torch._foreach_lerp_([self._averages[name] for name in at_once], list(at_once.values()), weight)
        for name in values.keys() - at_once.keys():
            average = self._averages[name]
            average.lerp_(values[name].to(average.device, torch.float32), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the average, rounded to their dtype; afterwards they are those of training again."""
        with self._optimizer.substituted(self._averages):
            yield

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The live averages by name, and the number of updates."""
        return dict(self._averages), {"updates": self.updates}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> None:
        """Continue where :meth:`state` was taken.  Raises UserError if it lacks a weight."""
        if missing := [name for name in self._averages if name not in tensors]:
            raise UserError(f"the checkpoint has no average of {missing[0]!r} ({len(missing)} are missing)")
        for name, average in self._averages.items():
            average.copy_(tensors[name])
        self.updates = scalars.get("updates", 0)


def _is_like(value: Tensor, average: Tensor) -> bool:
    return value.dtype is average.dtype and value.device == average.device
