"""A run that is told to stop, at any place and in any way, or that loses a rank, continues to the weights of one that was not."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.harness import World, run_world, world
from tests.distributed.test_run import assert_same_tensors, export_of, losses_of
from utils.data.cache.shards import ShardFolder
from utils.stopping import DONE, RUN_AGAIN, USER_ERROR

EVALUATED = 30
"""The one step after which the run evaluates, long enough to be caught in the middle."""
SETTINGS = {
    "max_steps": 2 * EVALUATED - 1,
    "checkpoint_every_n_steps": 5,
    "eval_every_n_steps": EVALUATED,
    "eval_before_first_step": False,
    "eval_timesteps": [place / 16 for place in range(1, 16)],
    "save_every_n_steps": EVALUATED,
}
ENDS_WITHIN = 30
"""Seconds in which all ranks are gone after one is."""


def lines_of(run: Path, kind: str) -> list[dict]:
    """Lines of the metrics; a last one that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


class Stopped:
    """One run of two stages, started again and again."""

    def __init__(self, workspace, model: Path):
        evaluated = [{"name": "held-out", "config": str(workspace.dataset)}]
        self.workspace, self.settings = workspace, {**SETTINGS, "eval_datasets": evaluated}
        self.config = workspace.config("stopped", model, **self.settings, pipeline_stages=2, resume="latest-or-new")
        self.folder = workspace.run("stopped")
        self.model = model

    def started(self, *arguments: str, **options):
        return world(["train.py", "--config", self.config, *arguments], 2, self.workspace.folder, **options)

    def lines(self, kind: str) -> list[dict]:
        return lines_of(self.folder, kind)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines("step")), default=0)

    @property
    def checkpoints(self) -> list[str]:
        return sorted(folder.name for folder in self.folder.glob("checkpoints/step-*"))

    def trains(self, running: World, steps: int = 2) -> None:
        """Wait until so many steps are done in this start."""
        running.wait_until(lambda: "continuing from step" in running.said() or "step 1/" in running.said())
        first = int((re.findall(r"continuing from step (\d+)", running.said()) or [0])[0])
        running.wait_until(lambda: self.step >= first + steps)

    def saved_and_asks_for_another_start(self, running: World, reason: str) -> None:
        running.wait_until_over(120)
        assert [process.returncode for process in running.processes] == [RUN_AGAIN] * 2, running.said()
        assert f"stopped before the end: {reason}" in running.said()
        assert self.checkpoints[-1] == f"step-{self.step:08d}", "the last step that was done is not saved"


def test_stopped_in_every_way_it_continues_exactly(workspace, tiny):
    model = tiny("wan-t2v")
    run = Stopped(workspace, model)

    # While Python imports, on one rank only.
    with run.started(fresh=True) as running:
        running.wait_until(lambda: catches(running.processes[1].pid, signal.SIGUSR1))
        running.processes[1].send_signal(signal.SIGUSR1)
        running.wait_until_over(120)
        assert [process.returncode for process in running.processes] == [RUN_AGAIN] * 2, running.said()
        assert "SIGUSR1 on rank 1" in running.said()
    assert not run.checkpoints

    # Several times, different ones, to all.
    with run.started() as running:
        run.trains(running)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            for process in running.processes:
                process.send_signal(number)
        # Signals that wait are not handed over in the order in which they were sent: either may be the first.
        run.saved_and_asks_for_another_start(running, "SIG")

    # While it evaluates, on one rank only: the evaluation and the export of that step are left to the next start.
    with run.started() as running:
        running.wait_until(lambda: run.step >= EVALUATED)
        running.processes[1].send_signal(signal.SIGTERM)
        run.saved_and_asks_for_another_start(running, "SIGTERM on rank 1")
        assert run.step == EVALUATED
        assert not run.lines("eval"), "it was over before the signal came"
        assert not (run.folder / "exports").exists()

    # One interrupt, which reaches a rank twice as it does under a launcher.
    with run.started() as running:
        run.trains(running)
        assert "the run was stopped before this was done: evaluation, export" in running.said()
        assert len(run.lines("eval")) == 1
        for _ in range(2):
            for process in running.processes:
                process.send_signal(signal.SIGINT)
        run.saved_and_asks_for_another_start(running, "SIGINT")

    # The job's time is over, soon after the start; the job is older than the process.
    with run.started("--set", "limits.time=10m", environment={"FLOWSTAGE_JOB_START": str(time.time() - 537)}) as running:
        run.saved_and_asks_for_another_start(running, "the time limit of 600 s is 60 s away")

    # A second interrupt ends at once; the other rank learns of it.
    with run.started() as running:
        run.trains(running)
        first = running.processes[0]
        os.kill(first.pid, signal.SIGSTOP)  # so that the first does not end the run before the second comes
        os.kill(running.processes[1].pid, signal.SIGINT)
        end = time.monotonic() + 1.5
        running.wait_until(lambda: time.monotonic() > end)
        os.kill(running.processes[1].pid, signal.SIGINT)
        os.kill(first.pid, signal.SIGCONT)
        running.wait_until_over(ENDS_WITHIN)
        assert running.processes[1].returncode == 128 + signal.SIGINT, running.said()

    # A rank is killed while it trains: the last line of the log says which.
    with run.started() as running:
        run.trains(running)
        running.processes[1].send_signal(signal.SIGKILL)
        running.wait_until_over(ENDS_WITHIN)
        assert [process.returncode for process in running.processes] == [1, -signal.SIGKILL]
        last = (run.folder / "log.txt").read_text().splitlines()[-1]
        assert re.search(r"rank 1 \(stage 1, host \S+\) vanished during (the time after )?step \d+", last), last
    with run.started() as running:
        run.trains(running, steps=1)
        running.processes[0].send_signal(signal.SIGKILL)
        running.wait_until_over(ENDS_WITHIN)
        assert [process.returncode for process in running.processes] == [-signal.SIGKILL, 1]
        assert re.search(r"rank 0 \(stage 0, host \S+\) vanished", (run.folder / "log.txt").read_text().splitlines()[-1])

    # A rank hangs: every other one says where it waits.
    with run.started("--set", "limits.hang_timeout=2s") as running:
        run.trains(running, steps=5)
        hung = running.processes[1]
        os.kill(hung.pid, signal.SIGSTOP)
        running.wait_until(lambda: running.processes[0].poll() is not None, 60)
        assert running.processes[0].returncode == 1
        last = (run.folder / "log.txt").read_text().splitlines()[-1]
        assert "the run hangs: step" in last
        assert re.search(r"no answer from rank 1 \(stage 1, host \S+\)", last), last
        assert "train_step" in (run.folder / "stacks-rank-0.txt").read_text()
        os.kill(hung.pid, signal.SIGCONT)  # it finds itself alone
        running.wait_until_over(ENDS_WITHIN)

    workspace.train(run.config, processes=2)
    straight = workspace.run("straight")
    workspace.train(workspace.config("straight", model, **run.settings))
    assert losses_of(run.folder) == losses_of(straight)
    assert run.lines("eval") == lines_of(straight, "eval")
    assert sorted(path.name for path in (run.folder / "exports").iterdir()) == ["step-00000030", "step-00000059"]
    assert_same_tensors(export_of(run.folder), export_of(straight))


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal by now."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_stopped_while_it_encodes_it_keeps_what_is_done(workspace, tiny):
    """By a signal to one rank, and by a file; no collective is open there, and all ranks stop."""
    sizes = ", ".join(str(size) for size in range(64, 320, 8))
    workspace.dataset.write_text(workspace.dataset.read_text().replace("resolutions = [\n    48,\n]", f"resolutions = [{sizes}]"))
    config = workspace.config("run", tiny("wan-t2v"), cache_dir=str(workspace.folder / "cache"), pipeline_stages=2)
    arguments = ["train.py", "--config", config, "--resume", "latest-or-new", "--cache-only"]
    file = workspace.run("run") / "request-stop"

    def told_to_stop(tell, exit_code: int) -> tuple[int, int, int]:
        """Latents that there are, that were there before, and that rank 0 has encoded."""
        with world(arguments, 2, workspace.folder) as running:
            running.wait_until(lambda: "to encode" in running.said())
            begun = cpu_seconds(running.processes[0].pid)
            running.wait_until(lambda: cpu_seconds(running.processes[0].pid) > begun + 1)
            tell(running)
            running.wait_until_over(120)
            assert [process.returncode for process in running.processes] == [exit_code] * 2, running.said()
            line = re.search(r"vae: (\d+) different inputs, (\d+) in the cache, (\d+) encoded here", running.said())
            return tuple(map(int, line.groups()))

    total, before, encoded = told_to_stop(lambda running: running.processes[1].send_signal(signal.SIGTERM), RUN_AGAIN)
    assert before == 0
    assert 0 < encoded < total / 2 - 1, "all of the rank's share, or nothing, was encoded when the signal came"
    kept = ShardFolder(next((workspace.folder / "cache" / "vae").iterdir()))
    kept.refresh()
    assert encoded <= len(kept.places) < total

    _, before, encoded = told_to_stop(lambda running: file.touch(), DONE)
    assert before == len(kept.places)
    assert encoded > 0
    assert not file.exists(), "the next start would stop too"
    kept.refresh()
    assert before + encoded <= len(kept.places) < total

    file.touch()
    said = run_world(arguments, 2, workspace.folder)
    assert "stopped before the end: the file request-stop" in said
    assert "to encode" not in said
    assert not file.exists()


@pytest.mark.parametrize("failing", [0, 2])
def test_the_last_line_names_the_rank_that_failed_and_no_other(tmp_path, failing):
    """The others' errors, of a connection that is closed, are consequences."""
    with world(["-m", "tests.distributed.watch_worker", str(failing)], 3, tmp_path) as running:
        running.wait_until_over(60)
        assert [process.returncode for process in running.processes] == [1, 1, 1], running.said()
        told = [line for output in running.outputs for line in output.read_text().splitlines() if "failed during" in line]
    assert told, running.said()
    for line in told:
        assert re.search(rf"rank {failing} \(stage {failing}, host \S+\) failed during step 7: RuntimeError: out of memory", line)


def test_a_file_that_is_not_what_was_looked_at_ends_all_with_the_users_error(workspace, tiny, copied_clips):
    """It was another when the data set was looked at; only one rank takes it."""
    workspace.dataset.write_text(f"resolutions = [48]\n[[directory]]\npath = {str(copied_clips)!r}\n")
    cache = str(workspace.folder / "cache")
    config = workspace.config("run", tiny("wan-t2v"), cache_dir=cache, pipeline_stages=2)
    workspace.train(config, "--cache-only", processes=2)
    clip = copied_clips / "rocket.jpg"
    state = clip.stat()
    clip.write_bytes(bytes(state.st_size))
    os.utime(clip, ns=(state.st_atime_ns, state.st_mtime_ns))  # so that it is not looked at again
    workspace.dataset.write_text(workspace.dataset.read_text().replace("48", "64"))
    said = workspace.train(config, "--cache-only", processes=2, expect=USER_ERROR)
    assert "these files cannot be encoded; repair or remove them" in said
    assert f"{clip}: it has changed since the run looked at it" in said
