"""Worker processes: what they give back, what becomes of errors and of killed ones, and what they keep of the rank."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.data.batches import workers
from utils.data.batches.workers import WorkerPool
from utils.data.values import MicroBatch
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


def meet(folder: Path, number: int) -> MicroBatch:
    """The process that this is called in, as soon as it is called in so many."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) == number)
    return numbers(os.getpid(), torch.get_num_threads())


def pids_of(pool: WorkerPool, function: int, folder: Path) -> list[int]:
    """Of all workers, in their order; ``function`` is :func:`meet`."""
    folder.mkdir()
    futures = [pool.submit(function, folder, pool.number) for _ in range(pool.number)]
    found = [values_of(future.result(60)) for future in futures]
    assert {threads for _, threads in found} == {1}
    return [int(pid) for pid, _ in found]


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


def test_each_worker_is_a_process_with_one_thread_for_tensors(tmp_path):
    with WorkerPool(3) as pool:
        pids = pids_of(pool, pool.add(meet), tmp_path / "met")
        assert len({*pids, os.getpid()}) == 4
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


def test_a_killed_worker_is_named_with_what_to_do(tmp_path):
    with WorkerPool(2) as pool:
        function, nap = pool.add(meet), pool.add(sleep)
        first, second = pids_of(pool, function, tmp_path / "met")
        waiting = [pool.submit(nap, 600.0) for _ in range(4)]
        os.kill(first, signal.SIGKILL)
        said = rf"data worker 1 of 2 \(process {first}\) was killed by SIGKILL. That is what happens when memory runs out"
        for future in (waiting[0], waiting[2], pool.submit(nap, 0.0)):
            with pytest.raises(RuntimeError, match=said):
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


def assert_signals_do_nothing(pool: WorkerPool, folder: Path) -> None:
    function = pool.add(meet)
    pids = pids_of(pool, function, folder / "met")
    for pid in pids:
        for number in SIGNALS:
            os.kill(pid, number)
    assert pids_of(pool, function, folder / "again") == pids


def test_signals_do_not_end_a_worker(tmp_path):
    """Although nobody has asked to hear of them, so that this process would die of them."""
    with WorkerPool(2) as pool:
        assert_signals_do_nothing(pool, tmp_path)


def test_signals_are_left_to_the_rank(heard, tmp_path):
    """A worker does not tell the rank of them, which hears of its own as before."""
    with WorkerPool(2) as pool:
        assert_signals_do_nothing(pool, tmp_path)
        assert heard() == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard() == [signal.SIGUSR1] * 2


def test_a_connection_of_the_rank_ends_with_the_rank(tmp_path):
    """The other end would else take a rank that is gone for one that is busy."""
    ours, theirs = socket.socketpair()
    with WorkerPool(2) as pool:
        function = pool.add(meet)
        pids = pids_of(pool, function, tmp_path / "met")
        ours.close()
        theirs.settimeout(30)
        assert theirs.recv(1) == b""
        assert pids_of(pool, function, tmp_path / "again") == pids
    theirs.close()


def test_a_worker_that_is_stuck_at_its_birth_is_replaced(monkeypatch, tmp_path, caplog):
    """As one that was forked while a thread of the rank held a lock that it needs."""
    monkeypatch.setattr(workers, "BIRTH_SECONDS", 1.0)
    as_usual = workers._let_go_of_sockets

    def stuck_once() -> None:
        try:
            (tmp_path / "stuck").touch(exist_ok=False)
        except FileExistsError:
            return as_usual()
        time.sleep(600)

    monkeypatch.setattr(workers, "_let_go_of_sockets", stuck_once)
    with WorkerPool(2) as pool:
        pids = pids_of(pool, pool.add(meet), tmp_path / "met")
        assert all(map(is_running, pids))
    assert re.findall(r"data worker \d of 2 \(process \d+\) did not begin", caplog.text)
    assert not any(map(is_running, pids))


ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "leave(75)",
    "done": "leave(DONE)",
    "ended by a thread": "leave(1, at_once=True)",
    "failed": "raise ValueError('an accident')",
}
RANKS = """
import os, signal, sys, time
from pathlib import Path
from tests.utils.data.batches.test_workers import ENDS, meet, pids_of, sleep
from utils.data.batches.workers import WorkerPool
from utils.stopping import DONE, leave

for name, end in ENDS.items():
    if os.fork() == 0:
        pool = WorkerPool(3)
        function, nap = pool.add(meet), pool.add(sleep)
        print(*pids_of(pool, function, Path(sys.argv[1]) / name), flush=True)
        for _ in range(2):
            pool.submit(nap, 600.0)
        exec(end)
        time.sleep(600)
while True:
    os.wait()
"""


def test_no_worker_outlives_its_rank_however_that_ends(process_environment, tmp_path):
    """Neither idle nor busy ones."""
    command = [sys.executable, "-c", RANKS, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=process_environment) as ranks:
        # Nothing holds the output open.
        said = ranks.stdout.read().splitlines()
    pids = [int(pid) for line in said for pid in line.split()]
    assert len(set(pids)) == 3 * len(ENDS)
    wait_until(lambda: not any(map(is_running, pids)))
