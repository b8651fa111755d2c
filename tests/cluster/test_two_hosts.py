"""Two hosts: network namespaces with a cable between them.  Its end ends both sides, and the run continues when it is back."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, World, free_port, rank_environment
from tests.distributed.test_run import assert_same_tensors, export_of, losses_of, steps_of

ENDS_WITHIN = 30
SETTINGS = {"max_steps": 40, "checkpoint_every_n_steps": 5}


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass(frozen=True)
class Host:
    namespace: str
    device: str
    address: str


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two, at the ends of one cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (Debian's iproute2)")
    pair = [Host(f"flowstage-{os.getpid()}-{side}", f"cable{side}", f"10.77.0.{side}") for side in (1, 2)]
    try:
        ip("netns", "add", pair[0].namespace)
    except AssertionError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("netns", "add", pair[1].namespace)
        one, other = pair
        ip(
            "link",
            "add",
            one.device,
            "netns",
            one.namespace,
            "type",
            "veth",
            "peer",
            "name",
            other.device,
            "netns",
            other.namespace,
        )
        for host in pair:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            for device in (host.device, "lo"):
                ip("-n", host.namespace, "link", "set", device, "up")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


@contextmanager
def one_rank_each(hosts: list[Host], config: Path, folder: Path) -> Iterator[World]:
    """``train.py`` as rank 0 on the first host and rank 1 on the second."""
    port, running, outputs = free_port(), [], []
    for rank, host in enumerate(hosts):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(len(hosts))}
        meeting = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": host.device}
        outputs.append(folder / f"host-{time.monotonic_ns()}-rank-{rank}.txt")
        with outputs[-1].open("w") as file:
            command = ["ip", "netns", "exec", host.namespace, sys.executable, "train.py", "--config", str(config)]
            environment = rank_environment(**place, **meeting)
            running.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True)
            )
    started = World(running, outputs)
    try:
        yield started
    finally:
        started.kill()


def test_a_cut_cable_ends_both_sides_and_the_run_continues_exactly(workspace, tiny, hosts):
    model = tiny("wan-t2v")
    workspace.train(workspace.config("straight", model, **SETTINGS))
    config = workspace.config("run", model, **SETTINGS, pipeline_stages=2, resume="latest-or-new")
    run = workspace.run("run")
    checkpoint = run / "checkpoints" / "step-00000005"

    with one_rank_each(hosts, config, workspace.folder) as running:
        running.wait_until(checkpoint.is_dir)
        ip("-n", hosts[0].namespace, "link", "set", hosts[0].device, "down")
        running.wait_until_over(ENDS_WITHIN)
        assert [process.returncode for process in running.processes] == [1, 1], running.said()
        for lost, output in zip((1, 0), running.outputs, strict=True):
            last = output.read_text().splitlines()[-1]
            assert re.search(rf"rank {lost} \(stage {lost}, host \S+\) vanished during .*its machine cannot be reached", last), last
    assert 5 <= len(steps_of(run)) < SETTINGS["max_steps"]

    ip("-n", hosts[0].namespace, "link", "set", hosts[0].device, "up")
    with one_rank_each(hosts, config, workspace.folder) as running:
        assert running.wait(300) == [0, 0], running.said()
        assert "continuing from step" in running.said()
    assert losses_of(run) == losses_of(workspace.run("straight"))
    assert_same_tensors(export_of(run), export_of(workspace.run("straight")))
