"""Which checkpoints may go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.checkpoints.checkpoint import Checkpoint
from utils.config.schema import RunConfig


@dataclass(frozen=True)
class Retention:
    """What is kept: a checkpoint goes when none of the rules wants it."""

    last: int | None = None
    """The newest so many; None keeps all."""
    every_n_steps: int | None = None
    """Of each so many steps the first checkpoint (at step n or the first after it, the first after 2 n, …)."""
    best: int = 0
    """So many with the lowest held-out loss, of those that were written at a step at which it was measured."""

    @classmethod
    def of(cls, config: RunConfig) -> "Retention":
        last = None if config.keep_last == "all" else config.keep_last
        return cls(last, config.keep_every_n_steps, config.keep_best or 0)

    def to_remove(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that may go, of whole ones by rising step.  The newest is always kept."""
        if self.last is None:
            return []
        kept = {id(checkpoint) for checkpoint in checkpoints[-max(1, self.last) :]}
        if self.every_n_steps is not None:
            first_of: dict[int, Checkpoint] = {}
            for checkpoint in checkpoints:
                first_of.setdefault(checkpoint.progress.step // self.every_n_steps, checkpoint)
            kept |= {id(checkpoint) for multiple, checkpoint in first_of.items() if multiple > 0}
        ranked = sorted(checkpoints, key=lambda checkpoint: (_loss(checkpoint), -checkpoint.progress.step))
        kept |= {id(checkpoint) for checkpoint in ranked[: self.best] if _loss(checkpoint) < math.inf}
        return [checkpoint for checkpoint in checkpoints if id(checkpoint) not in kept]


def _loss(checkpoint: Checkpoint) -> float:
    loss = checkpoint.eval_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf
