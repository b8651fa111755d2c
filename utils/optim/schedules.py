"""Learning rate over the steps of a run: pure functions."""

import math
from collections.abc import Callable

# The course after the warm-up, of the part that is done (0 at its first step, 1 after the last) to a factor.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    # Half a cosine without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5).
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0.

    During the warm-up (step + 1) / warmup_steps, so that the first step is not lost.  Then the schedule, which comes to 0 at
    ``total_steps``: after the last step, not at it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, done))
