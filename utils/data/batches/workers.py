"""Processes that prepare micro-batches ahead of training.

They are forked from the rank, so they have the samples, the cache and the family without anything being sent; only which
micro-batch is wanted goes to them, and its tensors come back, both through pipes (a container's /dev/shm may be small).  A worker
has nothing of its own to save, so it may be killed at any moment: it leaves signals to the rank, and dies with it.
"""

import ctypes
import gc
import logging
import os
import pickle
import signal
import stat
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from utils.data.values import MicroBatch
from utils.errors import UserError
from utils.stopping import SIGNALS

log = logging.getLogger(__name__)

PIPE_BYTES = 1 << 20
"""What a pipe holds, where the system allows it: fewer, larger pieces."""
BIRTHS, BIRTH_SECONDS = 3, 60.0
"""How often a worker is started that does not begin, each time after so long."""
_READY = b"ready"
_PR_SET_PDEATHSIG = 1
_LIBRARY = ctypes.CDLL(None)

Function = Callable[..., MicroBatch]


@dataclass
class _Worker:
    """A process, as the rank sees it."""

    number: int
    pid: int
    requests: Connection
    results: Connection
    waiting: deque[Future[MicroBatch]] = field(default_factory=deque)
    """Of what it was asked for and has not sent, the oldest first."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    end: Exception | None = None
    """Why it can no longer be asked."""
    reader: threading.Thread | None = None


class WorkerPool:
    """So many processes, which call the functions that were given before they were forked.

    Whoever asks bounds what is read ahead: each request that was not yet taken holds one micro-batch in memory.
    """

    def __init__(self, number: int):
        self.number = number
        """0: there are none, and nothing can be asked."""
        self._functions: list[Function] = []
        self._workers: list[_Worker] = []
        self._closing = False

    def add(self, function: Function) -> int:
        """What :meth:`submit` calls this function by."""
        assert not self._workers, "the workers were forked without this function"
        self._functions.append(function)
        return len(self._functions) - 1

    def start(self) -> None:
        """Fork.  What the process has in memory now the workers keep, so this is best done before the weights are read.

        They die with the thread that calls this.
        """
        if len(self._workers) == self.number:
            return
        # All of them before the threads: a lock that a thread holds at the moment of a fork stays locked in the worker.
        for number in range(self.number):
            self._workers.append(self._fork(number))
        for worker in self._workers:
            self._see_it_begin(worker)
        for worker in self._workers:
            name = f"data worker {worker.number + 1}"
            worker.reader = threading.Thread(target=self._receive, args=(worker,), name=name, daemon=True)
            worker.reader.start()

    def _see_it_begin(self, worker: _Worker) -> None:
        """Put another worker in the place of one that is stuck at its birth, by what some thread of the rank was at just then."""
        for _ in range(BIRTHS):
            try:
                if worker.results.poll(BIRTH_SECONDS) and worker.results.recv_bytes() == _READY:
                    return
            except (EOFError, OSError):
                pass  # it has said why
            log.warning("data worker %d of %d (process %d) did not begin", worker.number + 1, self.number, worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(worker.pid, 0)
            worker.requests.close()
            worker.results.close()
            other = self._fork(worker.number)
            worker.pid, worker.requests, worker.results = other.pid, other.requests, other.results
        raise RuntimeError("no data worker could be started; with num_loader_workers = 0 the rank reads its data itself")

    def submit(self, function: int, *arguments: Any) -> Future[MicroBatch]:
        """Ask the worker that has the least to do; starts the workers if that was not done."""
        self.start()
        return _ask(min(self._workers, key=lambda worker: len(worker.waiting)), (function, arguments))

    def close(self) -> None:
        """End the workers at once, whatever they are at."""
        self._closing = True
        for worker in self._workers:
            with worker.lock:  # the number of a process that is gone may be another's by now
                if worker.end is None:
                    os.kill(worker.pid, signal.SIGKILL)
        for worker in self._workers:
            if worker.reader is not None:
                worker.reader.join()
            worker.requests.close()
            worker.results.close()
        self._workers.clear()
        self._closing = False

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fork(self, number: int) -> _Worker:
        their_requests, requests = Pipe(duplex=False)
        results, their_results = Pipe(duplex=False)
        _enlarge(results)
        parent = os.getpid()
        # Held back until the child is deaf to them: a handler there would tell the rank's own thread.
        kept_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                ours = [end for worker in self._workers for end in (worker.requests, worker.results) if not end.closed]
                _become_worker(parent, [*ours, requests, results], kept_back, their_requests, their_results, self._functions)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept_back)
        their_requests.close()
        their_results.close()
        return _Worker(number, pid, requests, results)

    def _receive(self, worker: _Worker) -> None:
        """A thread: take what the worker sends as soon as it is there, so that nothing is copied while training waits for it."""
        with suppress(EOFError, OSError):
            while True:
                answer = pickle.loads(worker.results.recv_bytes())
                if isinstance(answer, Exception):
                    worker.waiting.popleft().set_exception(answer)
                else:
                    micro_batch = _receive_tensors(worker.results, answer)
                    worker.waiting.popleft().set_result(micro_batch)
        with suppress(ChildProcessError):  # somebody else has asked for it
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with worker.lock:
            worker.end = RuntimeError(self._obituary(worker))
        if not self._closing:
            log.error("%s", worker.end)
        while worker.waiting:
            worker.waiting.popleft().set_exception(worker.end)

    def _obituary(self, worker: _Worker) -> str:
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        except ChildProcessError:
            code = None
        name = f"data worker {worker.number + 1} of {self.number} (process {worker.pid})"
        if code is not None and code < 0:
            why = " That is what happens when memory runs out." if code == -signal.SIGKILL else ""
            return (
                f"{name} was killed by {signal.Signals(-code).name}.{why} With a lower num_loader_workers less is held in memory; "
                "with 0 the rank reads its data itself"
            )
        return f"{name} ended by itself" + (f" with exit code {code}" if code is not None else "")


def _ask(worker: _Worker, request: tuple[int, tuple[Any, ...]]) -> Future[MicroBatch]:
    future: Future[MicroBatch] = Future()
    with worker.lock:
        if worker.end is not None:
            future.set_exception(worker.end)
            return future
        worker.waiting.append(future)
    with suppress(OSError):  # the worker is gone, as the thread that reads from it finds out too
        worker.requests.send_bytes(pickle.dumps(request))
    return future


def _enlarge(pipe: Connection) -> None:
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
        with suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


# ── in the worker ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _become_worker(
    parent: int, ours: list[Connection], mask: Any, requests: Connection, results: Connection, functions: list[Function]
) -> NoReturn:
    """From here on this process answers requests, until there is nobody to ask."""
    try:
        # Slurm and terminals send signals to all processes of a job: the rank decides what becomes of them.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _die_with(parent)
        for connection in ours:
            connection.close()
        _let_go_of_sockets()
        _give_way()
        gc.freeze()  # what came from the rank is neither looked at nor finalised here
        torch.set_num_threads(1)
        _memory_of(torch.ones(1) + 1)  # whatever the first use of tensors waits for
        results.send_bytes(_READY)
        _serve(requests, results, functions)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _die_with(parent: int) -> None:
    with suppress(AttributeError):  # Linux's; elsewhere the end of the pipe tells
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _give_way() -> None:
    """A request that wakes a worker does not take the core from the rank that has sent it."""
    with suppress(OSError, AttributeError):  # Linux's
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _let_go_of_sockets() -> None:
    """A connection of the rank ends when the rank does, whoever was forked from it.

    Each becomes /dev/null instead of being closed, so that no file that is opened later gets a number that an object of the rank
    still takes for its own.
    """
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(entry.name) for entry in folder.iterdir()]:
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _serve(requests: Connection, results: Connection, functions: list[Function]) -> None:
    while True:
        try:
            function, arguments = pickle.loads(requests.recv_bytes())
        except EOFError:
            return
        try:
            tensors = _listed(functions[function](*arguments))
        except Exception as error:
            answer, tensors = _pickled(error), []
        else:
            answer = pickle.dumps([(group, name, tensor.dtype, tuple(tensor.shape)) for group, name, tensor in tensors])
        try:
            results.send_bytes(answer)
            _send_tensors(results, [tensor for _, _, tensor in tensors])
        except BrokenPipeError:
            return


def _pickled(error: Exception) -> bytes:
    """The error as it is, with where it came from unless it is told without; as a text if it cannot be sent."""
    where = traceback.format_exc()
    if not isinstance(error, UserError):
        error.add_note(f"in a data worker:\n{where}")
    try:
        pickle.loads(content := pickle.dumps(error))
        return content
    except Exception:
        return pickle.dumps(RuntimeError(f"in a data worker:\n{where}"))


# ── tensors through a pipe ────────────────────────────────────────────────────────────────────────────────────────────────────

Announced = list[tuple[str, str, torch.dtype, tuple[int, ...]]]
"""Of each tensor that follows: whether it belongs to the inputs or the target, its name, dtype and shape."""


def _listed(micro_batch: MicroBatch) -> list[tuple[str, str, Tensor]]:
    groups = {"inputs": micro_batch.inputs, "target": micro_batch.target}
    return [(group, name, tensor.contiguous()) for group, tensors in groups.items() for name, tensor in tensors.items()]


def _send_tensors(pipe: Connection, tensors: list[Tensor]) -> None:
    """Their memory as it is: nothing is copied but into the pipe."""
    for tensor in tensors:
        memory = _memory_of(tensor)
        while memory:
            memory = memory[os.write(pipe.fileno(), memory) :]


def _receive_tensors(pipe: Connection, announced: Announced) -> MicroBatch:
    """Raises EOFError if the worker ends in between."""
    groups: dict[str, dict[str, Tensor]] = {"inputs": {}, "target": {}}
    for group, name, dtype, shape in announced:
        tensor = groups[group][name] = torch.empty(shape, dtype=dtype)
        memory = _memory_of(tensor)
        while memory:
            if not (number := os.readv(pipe.fileno(), [memory])):
                raise EOFError
            memory = memory[number:]
    return MicroBatch(**groups)


def _memory_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
