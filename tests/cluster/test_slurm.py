"""launch/slurm.sbatch on a real Slurm: what ends a job there, it continues from, to the weights of a run that nothing ended."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.distributed.harness import ROOT
from tests.distributed.test_run import assert_same_tensors, export_of, losses_of

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SETTINGS = {"max_steps": 60, "checkpoint_every_n_steps": 10}


@pytest.fixture(scope="module")
def slurm(process_environment):
    environment = process_environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "FLOWSTAGE": str(ROOT)}
    # Not in pytest's folder: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        running = Slurm(Path(folder), environment)
        yield running
        running.stop()


class Job:
    """launch/slurm.sbatch with one task on each of two nodes, and what its run has done."""

    def __init__(self, slurm: Slurm, workspace, config: Path, *options: str):
        self.slurm, self.log, self.run = slurm, workspace.folder / "job.log", workspace.run(config.stem)
        shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={self.log}", *options]
        self.number = slurm.submit(*shape, ROOT / "launch" / "slurm.sbatch", config)
        self.seen = 0
        """Where in the log the present start begins."""

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def step(self) -> int:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        steps = [json.loads(line) for line in lines if line.endswith("\n")]
        return max((line["step"] for line in steps if line["kind"] == "step"), default=0)

    def trains(self) -> None:
        """Wait until this start does steps."""
        self.wait_until(lambda: "encoded data:" in self.said()[self.seen :])
        before = self.step()
        self.wait_until(lambda: self.step() > before)

    def start_again_now(self) -> None:
        self.slurm.wait_until(lambda: self.slurm.state(self.number) == "PENDING")
        self.seen = len(self.said())
        self.slurm.start_now(self.number)

    def wait_until(self, condition) -> None:
        try:
            self.slurm.wait_until(condition, 300)
        except AssertionError as error:
            raise AssertionError(f"{self.said()[-6000:]}\n{error}") from None


def test_what_slurm_ends_continues_exactly(workspace, tiny, slurm):
    model = tiny("wan-t2v")
    straight = workspace.config("straight", model, **SETTINGS)
    workspace.train(straight)
    config = workspace.config("run", model, **SETTINGS, pipeline_stages=2, resume="latest-or-new")
    without_limit = config.read_text()
    job = Job(slurm, workspace, config)

    job.trains()
    slurm.control("requeue", job.number)
    job.start_again_now()

    job.trains()
    high = slurm.submit("--partition=high", "--nodes=2", "--ntasks-per-node=4", f"--output={os.devnull}", "--wrap=true")
    slurm.wait_until(lambda: slurm.ends(high) == ["COMPLETED"])
    job.start_again_now()

    # Slurm's own warning before the time limit: the job queues itself again.
    job.trains()
    slurm.signal(job.number, "USR1")
    job.wait_until(lambda: slurm.state(job.number) == "PENDING")
    assert "The run has saved and is queued again." in job.said()

    # The run's own time limit, of which the start uses up what there is.
    config.write_text(without_limit + '\n[limits]\ntime = "62s"\n')
    job.start_again_now()
    job.wait_until(lambda: "the time limit of 62 s is 60 s away" in job.said() and slurm.state(job.number) == "PENDING")
    config.write_text(without_limit)
    job.start_again_now()

    # A node is lost; it comes back as soon as Slurm hears of it.
    job.trains()
    slurm.control("update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.wait_until(lambda: slurm.state(job.number) == "PENDING")
    job.start_again_now()

    job.wait_until(lambda: slurm.state(job.number) == "")
    assert slurm.ends(job.number)[-1] == "COMPLETED", job.said()[-3000:]
    assert "PREEMPTED" in slurm.ends(job.number)
    assert losses_of(job.run) == losses_of(workspace.run("straight"))
    assert_same_tensors(export_of(job.run), export_of(workspace.run("straight")))


def test_a_mistake_ends_the_job_and_cancelling_it_does_not_queue_it_again(workspace, tiny, slurm):
    model = tiny("wan-t2v")
    config = workspace.config("run", model, **SETTINGS, pipeline_stages=2, resume="latest-or-new")
    good = config.read_text()
    config.write_text(good.replace("max_steps", "max_stepps"))
    job = Job(slurm, workspace, config)
    job.wait_until(lambda: slurm.state(job.number) == "" and slurm.ends(job.number) == ["FAILED"])
    assert "did you mean `max_steps`" in job.said()
    assert "starting again" not in job.said()

    config.write_text(good)
    job = Job(slurm, workspace, config)
    job.trains()
    slurm.cancel(job.number)
    job.wait_until(lambda: slurm.state(job.number) == "")
    assert slurm.ends(job.number) == ["CANCELLED"]
    assert (job.run / "checkpoints" / f"step-{job.step():08d}").is_dir(), "it has saved all the same"


@pytest.mark.slow
def test_slurms_own_time_limit(workspace, tiny, slurm):
    """The shortest one that Slurm has is a minute."""
    config = workspace.config("run", tiny("wan-t2v"), max_steps=5000, pipeline_stages=2, resume="latest-or-new")
    job = Job(slurm, workspace, config, "--time=1", "--signal=USR1@20")
    job.wait_until(lambda: "The run has saved and is queued again." in job.said())
    assert "stopped before the end: SIGUSR1" in job.said()
    slurm.cancel(job.number)


@pytest.mark.slow
def test_after_an_accident_the_job_starts_the_run_again(workspace, tiny, slurm):
    config = workspace.config("run", tiny("wan-t2v"), max_steps=5000, pipeline_stages=2, resume="latest-or-new")
    job = Job(slurm, workspace, config)
    job.trains()
    [victim] = [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_rank(path, job.number, 1)]
    os.kill(victim, signal.SIGKILL)
    job.wait_until(lambda: "An accident (exit code 137): starting again in 10 s, 2 more time(s)." in job.said())
    assert "rank 1 (stage 1" in job.said()
    job.seen = len(job.said())
    job.trains()
    slurm.cancel(job.number)


def is_rank(process: Path, job: str, rank: int) -> bool:
    """Whether it is this job's train.py of this rank."""
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
        command = (process / "cmdline").read_bytes()
    except OSError:
        return False
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    return wanted <= set(variables) and b"train.py" in command and b"srun" not in command
