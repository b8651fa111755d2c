"""Worker processes: what they give back, what becomes of errors and of killed ones, and what they keep of the rank."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.data.values import MicroBatch
from utils.data.workers import WorkerPool
from utils.errors import UserError
from utils.stopping import SIGNALS


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """A zombie, which only its parent's parent has to take note of, is not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def numbers(*values: float) -> MicroBatch:
    return MicroBatch({"values": torch.tensor(values, dtype=torch.float64)}, {})


def own_pid() -> MicroBatch:
    return numbers(os.getpid(), torch.get_num_threads())


def sleep(seconds: float) -> MicroBatch:
    time.sleep(seconds)
    return numbers(seconds)


def values_of(micro_batch: MicroBatch) -> list[float]:
    return micro_batch.inputs["values"].tolist()


def test_tensors_come_back_as_they_were():
    """Of all dtypes, numbers without a dimension, views, one memory under two names, empty and large ones; in their order."""
    grid = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
    made = MicroBatch(
        {
            "x.y": grid.transpose(0, 2),
            "a": torch.tensor(3),
            "b": grid.bfloat16(),
            "same": grid,
            "part": grid[1:],
            "expanded": torch.ones(1, 1).expand(5, 6),
            "large": torch.randn(3_000_000),
        },
        {"velocity": torch.randn(2, 3, 1, 1), "mask": torch.zeros(0, 4, dtype=torch.bool), "again": grid},
    )
    with WorkerPool(1) as pool:
        found = pool.submit(pool.add(lambda: made)).result()
    for ours, theirs in ((made.inputs, found.inputs), (made.target, found.target)):
        assert list(ours) == list(theirs)
        assert all(theirs[name].dtype is tensor.dtype and torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_each_worker_is_a_process_with_one_thread_for_tensors_and_shares_the_work():
    with WorkerPool(3) as pool:
        function = pool.add(own_pid)
        found = [values_of(future.result()) for future in [pool.submit(function) for _ in range(6)]]
        pids = {int(pid) for pid, _ in found}
        assert len(pids) == 3
        assert os.getpid() not in pids
        assert {threads for _, threads in found} == {1}
        assert all(map(is_running, pids))
    assert not any(map(is_running, pids))


def test_several_functions_share_the_workers():
    with WorkerPool(2) as pool:
        double, negative = pool.add(lambda value: numbers(2 * value)), pool.add(lambda value: numbers(-value))
        futures = [pool.submit(function, value) for value in range(5) for function in (double, negative)]
        assert [values_of(future.result()) for future in futures] == [[each] for value in range(5) for each in (2 * value, -value)]


class Unsendable(Exception):
    def __init__(self, one: int, other: int):
        super().__init__(f"{one} and {other}")


def test_an_error_is_what_it_was_and_the_worker_goes_on():
    def fail(kind: str) -> MicroBatch:
        if kind == "user":
            raise UserError("data/a.png: it cannot be shown")
        if kind == "unsendable":
            raise Unsendable(1, 2)
        if kind == "bug":
            return numbers(1 / 0)
        return numbers(1)

    with WorkerPool(1) as pool:
        function = pool.add(fail)
        user, bug, unsendable, good = [pool.submit(function, kind) for kind in ("user", "bug", "unsendable", "")]
        with pytest.raises(UserError) as raised:
            user.result()
        assert str(raised.value) == "data/a.png: it cannot be shown"
        assert not hasattr(raised.value, "__notes__")
        with pytest.raises(ZeroDivisionError) as failed:
            bug.result()
        assert "return numbers(1 / 0)" in failed.value.__notes__[0]
        with pytest.raises(RuntimeError, match="Unsendable: 1 and 2"):
            unsendable.result()
        assert values_of(good.result()) == [1]


def test_a_killed_worker_is_named_with_what_to_do():
    with WorkerPool(2) as pool:
        pid, nap = pool.add(own_pid), pool.add(sleep)
        first, second = (int(values_of(future.result())[0]) for future in [pool.submit(pid) for _ in range(2)])
        waiting = [pool.submit(nap, 600.0) for _ in range(4)]
        os.kill(first, signal.SIGKILL)
        for future in (waiting[0], waiting[2], pool.submit(pid)):
            with pytest.raises(
                RuntimeError, match=rf"data worker 1 of 2 \(process {first}\) was killed by SIGKILL.*memory runs out"
            ):
                future.result(60)
        assert not waiting[1].done()
        assert is_running(second)
    assert not is_running(second)


def test_a_worker_that_ends_by_itself_is_an_error_too():
    with WorkerPool(1) as pool:
        future = pool.submit(pool.add(os._exit), 3)
        with pytest.raises(RuntimeError, match=r"data worker 1 of 1 \(process \d+\) ended by itself with exit code 3"):
            future.result(60)


@pytest.fixture
def heard():
    """Signals that this process heard of, by number: through handlers and the wake-up descriptor, as the Stopper does."""
    numbers: list[int] = []
    receive, send = os.pipe()
    os.set_blocking(receive, False)
    os.set_blocking(send, False)
    before = {number: signal.signal(number, lambda number, frame: numbers.append(number)) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(send)
    yield lambda: [*numbers, *_read(receive)]
    signal.set_wakeup_fd(descriptor)
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(receive)
    os.close(send)


def _read(descriptor: int) -> list[int]:
    try:
        return list(os.read(descriptor, 64))
    except BlockingIOError:
        return []


def test_signals_are_left_to_the_rank(heard):
    """Also those that come while a worker is born; a rank that gets one hears of it as before."""
    with WorkerPool(2) as pool:
        function = pool.add(own_pid)
        pids = {int(values_of(pool.submit(function).result())[0]) for _ in range(2)}
        for pid in pids:
            for number in SIGNALS:
                os.kill(pid, number)
        assert {int(values_of(future.result())[0]) for future in [pool.submit(function) for _ in range(8)]} >= pids
        assert heard() == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard() == [signal.SIGUSR1] * 2


def test_a_connection_of_the_rank_ends_with_the_rank():
    """The other end would else take a rank that is gone for one that is busy."""
    ours, theirs = socket.socketpair()
    with WorkerPool(2) as pool:
        function = pool.add(own_pid)
        [pool.submit(function).result() for _ in range(2)]
        ours.close()
        theirs.settimeout(30)
        assert theirs.recv(1) == b""
        assert pool.submit(function).result()
    theirs.close()


ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "leave(75)",
    "done": "leave(DONE)",
    "ended by a thread": "leave(1, at_once=True)",
    "failed": "raise ValueError('an accident')",
}
RANKS = """
import os, signal, sys, time
from tests.utils.data.test_workers import ENDS, own_pid, sleep, values_of
from utils.data.workers import WorkerPool
from utils.stopping import DONE, leave

for name, end in ENDS.items():
    if os.fork() == 0:
        pool = WorkerPool(3)
        function, nap = pool.add(own_pid), pool.add(sleep)
        futures = [pool.submit(function) for _ in range(3)]
        print(*(int(values_of(future.result())[0]) for future in futures), flush=True)
        for _ in range(2):
            pool.submit(nap, 600.0)
        exec(end)
        time.sleep(600)
while True:
    os.wait()
"""


def test_no_worker_outlives_its_rank_however_that_ends(process_environment):
    """Neither idle nor busy ones."""
    command = [sys.executable, "-c", RANKS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=process_environment) as ranks:
        # Nothing holds the output open.
        said = ranks.stdout.read().splitlines()
    pids = [int(pid) for line in said for pid in line.split()]
    assert len(pids) == 3 * len(ENDS)
    wait_until(lambda: not any(map(is_running, pids)))
