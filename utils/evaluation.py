"""Held-out loss: every sample with its fixed noise, at fixed quantiles of the timestep distribution."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.data.batches.loader import BatchLoader
from utils.data.batches.order import MicroBatchPlan
from utils.data.values import Sample
from utils.draw import Draw
from utils.metrics import MetricLog
from utils.pipeline.engine import StageEngine
from utils.topology import Topology
from utils.trained import Trained

log = logging.getLogger(__name__)

# Evaluation has an epoch of its own, so that its noise is the same whenever it is run.
EVALUATION_EPOCH = -1
# Held-out micro-batches between two looks at whether to stop, for each stage: the pipeline runs empty there.
EVAL_CHUNK = 8

Agree = Callable[[Any], tuple[list[Any], bool]]
"""Exchanges a value and what the ranks ask for: the value of each rank, and whether they agreed to end.  Collective."""


@dataclass(frozen=True)
class EvalData:
    """One held-out dataset, encoded."""

    samples: list[Sample]
    loader: BatchLoader


class Evaluation:
    """Measures the held-out losses of the weights as they are, or of their average.  All methods are collective."""

    def __init__(
        self,
        topology: Topology,
        engine: StageEngine,
        trained: Trained,
        data: Mapping[str, EvalData],
        metrics: MetricLog,
        *,
        timesteps: Sequence[float],
        seed: int,
    ):
        self.topology, self.engine, self.trained, self.data = topology, engine, trained, data
        self.metrics, self.timesteps, self.seed = metrics, timesteps, seed
        self._step: int | None = None
        self._losses: dict[str, float] = {}

    def losses_at(self, step: int) -> dict[str, float]:
        """By dataset, the mean over the timesteps; nothing if they were not measured at this step."""
        return self._losses if self._step == step else {}

    def measure(self, step: int, agree: Agree) -> bool:
        """False, and nothing reported, if the ranks agreed to end before it was done."""
        measured: dict[str, dict[float, float]] = {}
        for name, data in self.data.items():
            with self.trained.for_evaluation():
                for place in self.timesteps:
                    if (loss := self._loss(data, place, agree)) is None:
                        return False
                    measured.setdefault(name, {})[place] = loss
        for name, losses in measured.items():
            values: dict[str, Any] = {f"loss_at_{place:g}": loss for place, loss in losses.items()}
            mean = sum(losses.values()) / len(losses)
            log.info("eval %s: loss %.5f at step %d", name, mean, step)
            self.metrics.event("eval", {"step": step, "dataset": name, "loss": mean, **values})
            self._losses[name] = mean
        self._step = step
        return True

    def _loss(self, data: EvalData, place: float, agree: Agree) -> float | None:
        """None if the ranks agreed to end before it was measured."""
        topology = self.topology
        # One sample each, so that sizes need not fit; replicas that have one less repeat their last, which is not counted.
        plans = [MicroBatchPlan.single(index, sample.key) for index, sample in enumerate(data.samples)]
        mine = plans[topology.replica :: topology.replicas]
        count = -(-len(plans) // topology.replicas)
        padded = mine + (mine or plans)[-1:] * (count - len(mine))
        draw = Draw(self.seed, EVALUATION_EPOCH, fixed_time=place)
        batches = data.loader.prepared((plan, draw) for plan in padded) if topology.reads_data else iter(())
        losses: list[float] = []
        everywhere: list[float] = []
        for first in range(0, count, EVAL_CHUNK * topology.stages):
            chunk = min(EVAL_CHUNK * topology.stages, count - first)
            losses += self.engine.evaluate(batches, chunk) or []
            parts, ends = agree(losses[first : len(mine)])
            if ends:
                return None
            everywhere += itertools.chain.from_iterable(parts)
        return sum(sorted(everywhere)) / len(everywhere)
