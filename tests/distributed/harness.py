"""Starts a few processes as a launcher would, and says what each of them said when one fails."""

import atexit
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Rank:
    """A process forked by :mod:`tests.distributed.preloaded`, to be handled as a ``Popen``."""

    def __init__(self):
        self.pid = 0
        self.returncode: int | None = None
        self.began, self.ended = threading.Event(), threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("rank", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


class Preloaded:
    """The process that ranks are forked from, started at the first use and ended with the tests."""

    def __init__(self):
        self._ranks: dict[int, Rank] = {}
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.preloaded"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=rank_environment(),
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._process.stdin.close)

    def start(self, arguments: Sequence[str], environment: dict[str, str], output: Path) -> Rank:
        number, rank = next(self._numbers), Rank()
        self._ranks[number] = rank
        request = {"number": number, "arguments": arguments, "environment": environment, "output": str(output)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        assert rank.began.wait(300), "the process that ranks are forked from does not answer"
        return rank

    def _listen(self) -> None:
        for line in self._process.stdout:
            message = json.loads(line)
            if "began" in message:
                rank = self._ranks[message["began"]]
                rank.pid = message["pid"]
                rank.began.set()
            else:
                rank = self._ranks.pop(message["ended"])
                rank.returncode = message["code"]
                rank.ended.set()


@cache
def preloaded() -> Preloaded:
    return Preloaded()


def rank_environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


@dataclass(frozen=True)
class World:
    """Running processes of one training, with their outputs in files."""

    processes: list[subprocess.Popen | Rank]
    outputs: list[Path]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):  # it has ended just now
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

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def wait_until_over(self, timeout: float) -> None:
        """AssertionError if a process still runs after so many seconds."""
        deadline = time.monotonic() + timeout
        while not self.is_over():
            assert time.monotonic() < deadline, f"still running after {timeout} s\n{self.said()}"
            time.sleep(0.02)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Poll until the condition holds; AssertionError if the processes end or the time is over before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert any(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.02)


@contextmanager
def world(
    arguments: Sequence[str | Path],
    processes: int,
    folder: Path,
    environment: dict[str, str] | None = None,
    fresh: bool = False,
):
    """``python *arguments`` as so many ranks; they are killed at the end if they still run.

    ``fresh``: start Python anew for each, instead of forking a process that has imported everything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running, outputs = [], []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        variables = rank_environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **(environment or {}))
        outputs.append(folder / f"output-{time.monotonic_ns()}-rank-{rank}.txt")
        outputs[-1].touch()
        command = [str(argument) for argument in arguments]
        if not fresh and command[0] != "-c":
            running.append(preloaded().start(command, variables, outputs[-1]))
            continue
        with outputs[-1].open("w") as file:
            process = [sys.executable, *command]
            running.append(
                subprocess.Popen(process, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, start_new_session=True)
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
    fresh: bool = False,
) -> str:
    """Run to the end and return what was said; AssertionError with all outputs if an exit code is not ``expect``."""
    with world(arguments, processes, folder, environment, fresh) as started:
        codes = started.wait(timeout)
        assert all(code == expect for code in codes), started.said()
        return started.said()
