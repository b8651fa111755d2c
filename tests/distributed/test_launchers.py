"""The same train.py under each launcher: every one gives the losses of one plain process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, free_port, run_world
from tests.distributed.test_run import losses_of

BIN = Path(sys.executable).parent


@pytest.fixture
def straight(workspace, tiny):
    """Config of a two-stage run, and the losses of one plain process."""
    settings = {"max_steps": 2, "checkpoint_every_n_steps": None}
    one = workspace.config("one", tiny("wan-t2v"), **settings)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "train.py", "--config", one], cwd=ROOT, env=environment, check=True, capture_output=True)

    def launched(name: str, command: list[str]) -> list:
        config = workspace.config(name, tiny("wan-t2v"), pipeline_stages=2, **settings)
        done = subprocess.run(
            [*command, "train.py", "--config", str(config)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return losses_of(workspace.run(name))

    return launched, losses_of(workspace.run("one"))


def test_deepspeed_and_torchrun(straight):
    launched, losses = straight
    assert len(losses) == 2
    deepspeed = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    assert launched("deepspeed", deepspeed) == losses
    assert launched("torchrun", [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]) == losses


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
