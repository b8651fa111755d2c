"""The same train.py under each launcher: every one gives the losses of one plain process, and passes on what it can of signals."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, free_port, run_world
from tests.distributed.test_run import losses_of, steps_of
from utils.stopping import RUN_AGAIN, USER_ERROR

BIN = Path(sys.executable).parent
SHORT = {"max_steps": 2, "checkpoint_every_n_steps": None}


@pytest.fixture
def environment(process_environment) -> dict[str, str]:
    return process_environment | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def straight(workspace, tiny) -> list:
    """The losses of one plain process."""
    workspace.train(workspace.config("one", tiny("wan-t2v"), **SHORT))
    return losses_of(workspace.run("one"))


def test_deepspeed(workspace, tiny, straight, environment):
    config = workspace.config("run", tiny("wan-t2v"), **SHORT, pipeline_stages=2)
    command = [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "train.py", "--config", config]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses_of(workspace.run("run")) == straight
    assert len(straight) == 2


def test_multinode_with_a_launcher_on_each_machine(workspace, tiny, straight, environment):
    """torchrun's rendezvous; both machines are this one."""
    config = workspace.config("run", tiny("wan-t2v"), **SHORT, pipeline_stages=2)
    meeting = ["--rendezvous", f"127.0.0.1:{free_port()}", "--nodes", "2", "--gpus", "1"]
    with launched("multinode", [*meeting, config], environment, workspace.folder / "one.txt") as (one, said):
        with launched("multinode", [*meeting, config], environment, workspace.folder / "other.txt") as (other, others_words):
            assert other.wait(300) == 0, others_words()
        assert one.wait(300) == 0, said()
    assert losses_of(workspace.run("run")) == straight


@contextmanager
def launched(script: str, arguments: Sequence[object], environment: dict[str, str], output: Path) -> Iterator[tuple]:
    """A script of launch/ and what it has said so far; it is ended at the end if it still runs."""
    with output.open("w") as file:
        command = [ROOT / "launch" / script, *map(str, arguments)]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process, output.read_text
    finally:
        process.terminate()
        process.wait(60)


def wait_until(condition, said) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_local_starts_again_after_an_accident_and_hands_signals_on(workspace, tiny, environment):
    settings = {"max_steps": 500, "checkpoint_every_n_steps": 3, "pipeline_stages": 2}
    config = workspace.config("run", tiny("wan-t2v"), **settings)
    run, output = workspace.run("run"), workspace.folder / "output.txt"

    def steps() -> int:
        return len(steps_of(run)) if (run / "metrics.jsonl").exists() else 0

    with launched("local", ["--restarts", "1", config], environment, output) as (launcher, said):
        # Two processes, one for each stage, as there is no GPU.
        wait_until(lambda: steps() >= 4, said)
        ranks = children_of(launcher.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        wait_until(lambda: "continuing from step" in said(), said)
        assert "starting again from the last checkpoint in 1 s (1 of 1)" in said()
        assert "rank 1 (stage 1" in said()
        # The launcher itself is killed: its ranks save and end.
        before = steps()
        wait_until(lambda: steps() > before, said)
        ranks = children_of(launcher.pid)
        launcher.kill()
        wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), said)
        assert "stopped before the end: SIGTERM" in said()
        assert (run / "checkpoints" / f"step-{steps():08d}").is_dir()

    with launched("local", ["--gpus", "2", config, "--resume"], environment, output) as (launcher, said):
        wait_until(lambda: "continuing from step" in said(), said)
        before = steps()
        wait_until(lambda: steps() > before, said)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(120) == RUN_AGAIN, said()
        assert "stopped before the end: SIGUSR1" in said()
        assert re.search(rf"checkpoint step-{steps():08d}$", said(), re.MULTILINE)

    straight = workspace.config("straight", tiny("wan-t2v"), **settings | {"pipeline_stages": 1})
    workspace.train(straight, "--set", f"max_steps={steps()}")
    assert losses_of(run) == losses_of(workspace.run("straight"))


def test_local_does_not_start_again_what_the_user_must_put_right(workspace, tiny, environment):
    config = workspace.config("run", tiny("wan-t2v"), max_stepps=3)
    with launched("local", ["--restarts", "3", config], environment, workspace.folder / "output.txt") as (launcher, said):
        assert launcher.wait(300) == USER_ERROR
        assert "did you mean `max_steps`" in said()
        assert "starting again" not in said()
    nameless = workspace.config("run", tiny("wan-t2v"), run_name=None)
    with launched("local", ["--restarts", "3", nameless], environment, workspace.folder / "output.txt") as (launcher, said):
        assert launcher.wait(300) == USER_ERROR
        assert "--restarts needs run_name" in said()


def test_the_variables_of_srun(workspace, tiny):
    """Two tasks with Slurm's variables and none of torch's (a real Slurm is more than this test starts)."""
    config = workspace.config("run", tiny("wan-t2v"), pipeline_stages=2, max_steps=1, checkpoint_every_n_steps=None)
    script = (
        "import os, runpy, sys; rank = os.environ['RANK'];"
        "[os.environ.pop(name) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')];"
        "os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS='2', SLURM_LAUNCH_NODE_IPADDR='127.0.0.1');"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    port = free_port()
    job = {"SLURM_JOB_ID": str(port - 20000 if 20000 <= port < 40000 else 4711)}  # train.py makes the port from it
    run_world(["-c", script, "train.py", "--config", config], 2, workspace.folder, environment=job)
    assert len(losses_of(workspace.run("run"))) == 1


def test_check_needs_no_launcher_and_tells_the_stages(workspace, tiny):
    config = workspace.config("run", tiny("wan-i2v"), pipeline_stages=2)
    said = run_world(["train.py", "--config", config, "--check"], 1, workspace.folder)
    for part in ("stage 0: layers 0 to", "stage 1: layers", "wan-i2v", "steps per epoch", "64x", "the config is good"):
        assert part in said, part
    assert not workspace.run("run").exists()
