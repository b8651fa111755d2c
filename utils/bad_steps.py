"""Steps whose loss or gradient is not finite: they change no weight, and too many of them in a row end the run."""

import logging
from collections.abc import Sequence

from utils.errors import UserError

log = logging.getLogger(__name__)

# So many samples are named in the error that ends the run; the log has the others.
NAMED_SAMPLES = 12


class BadSteps:
    """The refused steps since the last good one."""

    def __init__(self, allowed: int):
        self.allowed = allowed
        self._samples: list[Sequence[str]] = []

    def good(self) -> None:
        self._samples.clear()

    def bad(self, step: int, loss: float, grad_norm: float, samples: Sequence[str]) -> None:
        """``step``: its number, counted from 1.  ``samples``: the keys of the global batch."""
        self._samples.append(samples)
        log.error(
            "step %d was skipped, no weight was changed: loss %s, gradient norm %s; its samples: %s",
            step,
            loss,
            grad_norm,
            ", ".join(samples),
        )

    @property
    def are_too_many(self) -> bool:
        return len(self._samples) >= self.allowed

    def error(self, step: int) -> UserError:
        """Why the run ends after ``step`` steps; every rank has the same."""
        samples = list(dict.fromkeys(sample for samples in self._samples for sample in samples))
        more = f" and {len(samples) - NAMED_SAMPLES} more, which the log names" if len(samples) > NAMED_SAMPLES else ""
        error = UserError(
            f"the loss or the gradient was not finite in {len(self._samples)} steps in a row (max_bad_steps), up to step {step}; "
            f"their samples: {', '.join(samples[:NAMED_SAMPLES])}{more}. The checkpoint has the weights of step "
            f"{step - len(self._samples)} and continues behind these samples. Look at them, try a lower optimizer.lr, or go back "
            "to an older checkpoint with --resume PATH"
        )
        error.everywhere = True
        return error
