"""When refused steps end a run, and what is said of them."""

import logging

from utils.bad_steps import BadSteps


def test_only_steps_in_a_row_count(caplog):
    steps = BadSteps(allowed=2)
    steps.bad(5, float("nan"), float("inf"), ["a#0", "b#1"])
    assert not steps.are_too_many
    steps.good()
    steps.bad(7, float("nan"), 1.0, ["c#0"])
    assert not steps.are_too_many
    steps.bad(8, 1.0, float("inf"), ["d#0", "c#0"])
    assert steps.are_too_many
    logged = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "step 5 was skipped" in logged[0]
    assert "a#0, b#1" in logged[0]
    message = str(steps.error(8))
    assert "in 2 steps in a row (max_bad_steps), up to step 8; their samples: c#0, d#0." in message
    assert "the weights of step 6" in message
    assert steps.error(8).everywhere


def test_many_samples_are_counted():
    steps = BadSteps(allowed=1)
    steps.bad(1, 0.0, 0.0, [f"{number}#0" for number in range(40)])
    assert "11#0 and 28 more, which the log names" in str(steps.error(1))
