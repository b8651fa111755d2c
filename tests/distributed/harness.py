"""Starts a few processes as a launcher would, and says what each of them said when one fails."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class World:
    """Running processes of one training, with their outputs in files."""

    processes: list[subprocess.Popen]
    outputs: list[Path]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def said(self) -> str:
        """The end of every process's output."""
        parts = (
            f"--- rank {rank}, exit code {process.poll()}\n{path.read_text()[-6000:]}"
            for rank, (process, path) in enumerate(zip(self.processes, self.outputs, strict=True))
        )
        return "\n".join(parts)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes.  When one process fails the others are given ten seconds, then killed."""
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() for process in self.processes):
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Poll until the condition holds; AssertionError if the processes end or the time is over before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert any(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.02)


@contextmanager
def world(arguments: Sequence[str | Path], processes: int, folder: Path, environment: dict[str, str] | None = None):
    """``python *arguments`` as so many ranks; they are killed at the end if they still run."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running, outputs = [], []
    for rank in range(processes):
        variables = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(environment or {}),
        }
        outputs.append(folder / f"output-{time.monotonic_ns()}-rank-{rank}.txt")
        with outputs[-1].open("w") as file:
            command = [sys.executable, *map(str, arguments)]
            running.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, start_new_session=True)
            )
    started = World(running, outputs)
    try:
        yield started
    finally:
        started.kill()


def run_world(
    arguments: Sequence[str | Path],
    processes: int,
    folder: Path,
    *,
    timeout: float = 300,
    expect: int = 0,
    environment: dict[str, str] | None = None,
) -> str:
    """Run to the end and return what was said; AssertionError with all outputs if an exit code is not ``expect``."""
    with world(arguments, processes, folder, environment) as started:
        codes = started.wait(timeout)
        assert all(code == expect for code in codes), started.said()
        return started.said()
