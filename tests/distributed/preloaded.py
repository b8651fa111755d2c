"""A process that has imported everything and forks itself for each rank: a rank starts in a moment instead of in six seconds.

What is forked is a process of its own, with its own session, environment and output, and ends as any Python process does.
Requests are lines of JSON on the standard input; the standard output answers with a line when a process has begun or ended.
"""

import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import sys
from pathlib import Path
from typing import Any


def import_everything() -> None:
    """What ranks import anyway."""
    import train  # noqa: F401

    models = importlib.import_module("models")
    for module in pkgutil.iter_modules(models.__path__):
        if module.ispkg and module.name != "common":
            models.load_family(module.name)
            importlib.import_module(f"tests.models.{module.name}.reference")
    importlib.import_module("torch.utils.tensorboard")
    # The first look at this attribute probes every operation of DeepSpeed.
    getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__")  # noqa: B009


def become_rank(request: dict[str, Any]) -> None:
    """In the forked process: run ``python *arguments`` as if it had just been started."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments = request["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def serve() -> dict[str, Any] | None:
    """Fork for each request until the input ends.  Returns the request in the forked process, None in this one."""
    ready, wake = os.pipe()
    os.set_blocking(ready, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    pids: dict[int, int] = {}
    pending = b""
    while True:
        readable, _, _ = select.select([0, ready], [], [])
        if ready in readable:
            os.read(ready, 4096)
            for pid in list(pids):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    tell({"ended": pids.pop(pid), "code": os.waitstatus_to_exitcode(status)})
        if 0 in readable:
            chunk = os.read(0, 1 << 20)
            if not chunk:
                return None
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    os.close(ready)
                    os.close(wake)
                    return request
                pids[pid] = request["number"]
                tell({"began": request["number"], "pid": pid})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import_everything()
    # Out of the loop before the rank's own program begins, so that it ends as a program does: exit code, threads, atexit.
    if (request := serve()) is not None:
        become_rank(request)
