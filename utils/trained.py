"""What training changes on this rank, and a checkpoint brings back: weights, the optimizer's state, the average of the weights."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from utils.checkpoints.checkpoint import Checkpoint
from utils.config.schema import EmaConfig
from utils.optim.ema import WeightAverage
from utils.optim.optimizers import RunOptimizer
from utils.topology import Topology

log = logging.getLogger(__name__)


class Trained:
    """The trained weights of this rank's stage, and what belongs to them; everything is known by the weight's name."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: RunOptimizer,
        ema: EmaConfig | None,
        topology: Topology,
        checkpoint: Checkpoint | None,
    ):
        """The parameters are filled already, from the checkpoint if there is one; the rest of it is read here."""
        self.parameters, self.optimizer, self.topology = dict(parameters), optimizer, topology
        if checkpoint is not None:
            optimizer.load_state(*checkpoint.optimizer(optimizer.owned))
        # It begins with the weights as they are now.
        self.average = WeightAverage(optimizer, ema) if ema else None
        if self.average is not None and checkpoint is not None:
            if "ema" in checkpoint.kinds():
                self.average.load_state(checkpoint.tensors("ema", optimizer.owned), checkpoint.scalars("ema"))
            else:
                log.info("the checkpoint has no average of the weights: it begins with those of step %d", checkpoint.progress.step)

    def weights(self) -> dict[str, Tensor]:
        """The live tensors by name."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    @contextmanager
    def for_evaluation(self) -> Iterator[None]:
        """Inside, the weights are those to evaluate: the average, if that is asked for; collective among replicas."""
        averaged = self.average is not None and self.average.config.evaluate
        with self.average.in_place() if averaged else self.optimizer.evaluation():
            yield

    @contextmanager
    def for_export(self, suffix: str) -> Iterator[dict[str, Tensor]]:
        """The weights of the export with this suffix, of :meth:`export_suffixes`; collective among replicas."""
        with self.average.in_place() if suffix else self.optimizer.evaluation():
            yield self.weights()

    def export_suffixes(self) -> list[str]:
        """What stands after the names of the exported files: nothing for the weights, ``_ema`` for their average."""
        return [""] if self.average is None else ["", "_ema"]

    def state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Mapping[str, Any]]]:
        """This rank's share of a checkpoint: live tensors and scalars, by kind.

        What all replicas of a stage have the same is the first one's to write.
        """
        groups: dict[str, Mapping[str, Tensor]] = {}
        scalars: dict[str, Mapping[str, Any]] = {}
        if self.topology.writes_weights:
            groups["weights"] = self.weights()
        if self.topology.writes_weights or self.optimizer.is_shared:
            groups["optimizer"], scalars["optimizer"] = self.optimizer.state()
            if self.average is not None:
                groups["ema"], scalars["ema"] = self.average.state()
        return groups, scalars
