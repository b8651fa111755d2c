"""A rank that is stopped or frozen outside of a step: the others notice that it is silent, tell where it was, and end."""

import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

from tests.distributed.harness import World, world
from tests.distributed.test_stopping import ENDS_WITHIN, cpu_seconds

SILENCE = 20
"""Seconds, the least that counts as a hang."""


def freeze(running: World, rank: int) -> None:
    """Stop a rank in the middle of its work."""
    frozen = running.processes[rank]
    begun = cpu_seconds(frozen.pid)
    # It has also told the other what it is at, by then.
    running.wait_until(lambda: cpu_seconds(frozen.pid) > begun + 2)
    os.kill(frozen.pid, signal.SIGSTOP)


def is_told(running: World, rank: int, phase: str, run: Path) -> None:
    """Wait for the end, and hold what the other one says against what it should."""
    frozen, other = running.processes[rank], running.processes[1 - rank]
    running.wait_until(lambda: other.poll() is not None, SILENCE + ENDS_WITHIN)
    assert other.returncode == 1, running.said()
    last = (run / "log.txt").read_text().splitlines()[-1]
    named = rf"the run hangs: rank {rank} \(stage {rank}, host \S+\) has given no sign of life for {SILENCE} s, during {phase}"
    assert re.search(named, last), last
    assert "no answer" not in last, "it would be named twice"
    stacks = (run / f"stacks-rank-{1 - rank}.txt").read_text()
    assert "no sign of life" in stacks
    assert "train.py" in stacks
    assert not (run / f"stacks-rank-{rank}.txt").exists()
    os.kill(frozen.pid, signal.SIGCONT)  # it finds itself alone
    running.wait_until_over(ENDS_WITHIN)


def test_a_rank_that_is_stopped_while_it_encodes_or_evaluates_ends_the_run(workspace, tiny):
    """Rank 1 while it encodes, and rank 0, through which the others talk, while it evaluates."""
    sizes = ", ".join(str(size) for size in range(64, 448, 8))
    dataset = workspace.folder / "many.toml"
    dataset.write_text(workspace.dataset.read_text().replace("resolutions = [\n    48,\n]", f"resolutions = [{sizes}]"))
    changes = {"pipeline_stages": 2, "limits": {"hang_timeout": f"{SILENCE}s"}}
    evaluated = {"eval_datasets": [{"name": "held-out", "config": str(workspace.dataset)}]}
    evaluated["eval_timesteps"] = [place / 400 for place in range(1, 400)]
    config = workspace.config(
        "encoding", tiny("wan-t2v"), dataset=str(dataset), cache_dir=str(workspace.folder / "cache"), **changes
    )
    with ExitStack() as both:
        encoding = both.enter_context(world(["train.py", "--config", config], 2, workspace.folder))
        encoding.wait_until(lambda: "to encode" in encoding.said())
        freeze(encoding, 1)
        config = workspace.config("evaluating", tiny("wan-t2v"), **evaluated, **changes)
        evaluating = both.enter_context(world(["train.py", "--config", config], 2, workspace.folder))
        evaluating.wait_until((workspace.run("evaluating") / "metrics.jsonl").is_file)
        freeze(evaluating, 0)
        is_told(encoding, 1, "encoding", workspace.run("encoding"))
        is_told(evaluating, 0, "the evaluation at step 0", workspace.run("evaluating"))
