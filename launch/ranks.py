"""The processes of one machine: started, given the signals, and started again after an accident.  See launch/local."""

import argparse
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from utils.stopping import DONE, FAILED, JOB_START, RUN_AGAIN, SIGNALS, USER_ERROR

log = logging.getLogger("launch")

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
INTERRUPTED = 128 + signal.SIGINT
GRACE_SECONDS = 40.0
"""How long the others may take to end by themselves when one has failed."""
MOST_SECONDS_BETWEEN = 60.0
FRUITLESS_STARTS = 3
"""Accidents in a row without a new checkpoint after which another start is not tried."""
PR_SET_PDEATHSIG = 1


class Ranks:
    """The running processes.  Signals that this process gets go to all of them, once each."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.told_to_stop = False
        for number in SIGNALS:
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: object) -> None:
        self.told_to_stop = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def run(self, arguments: Sequence[str], count: int) -> int:
        """Start train.py so many times, wait for all, and return the exit code of the whole."""
        port = _free_port()
        self.processes = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", TRAIN, *arguments],
                    env=os.environ | {name: str(value) for name, value in place.items()},
                    # Of a session of their own, they get Ctrl+C from here alone and not from the terminal a second time.
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )
        kill_at: float | None = None
        while any(process.poll() is None for process in self.processes):
            if kill_at is None and any(process.poll() for process in self.processes):
                kill_at = time.monotonic() + GRACE_SECONDS
            if kill_at is not None and time.monotonic() > kill_at:
                for process in self.processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.1)
        return outcome([process.returncode for process in self.processes])


def outcome(codes: Sequence[int]) -> int:
    """One exit code for those of all ranks: what a user must know goes before what may be tried again."""
    for code in (USER_ERROR, INTERRUPTED):
        if code in codes:
            return code
    if set(codes) - {DONE, RUN_AGAIN}:
        return FAILED
    return RUN_AGAIN if RUN_AGAIN in codes else DONE


def _end_with_parent() -> None:
    """Have the kernel ask this process to stop when its launcher is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _num_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _settings(config: Path, arguments: Sequence[str]) -> dict[str, object]:
    """The main file's values, with those of ``--set``; train.py says what is wrong with them."""
    try:
        settings: dict[str, object] = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    for flag, text in pairwise(arguments):
        if flag == "--set":
            key, _, value = text.partition("=")
            settings[key.strip()] = value.strip().strip("\"'")
    return settings


def _newest_checkpoint(run: Path) -> str:
    return max((folder.name for folder in run.glob("checkpoints/step-*")), default="")


def train(ranks: Ranks, config: Path, arguments: list[str], count: int, restarts: int) -> int:
    """Run, and run again after accidents as long as that leads on."""
    settings = _settings(config, arguments)
    if restarts and "run_name" not in settings:
        log.error("--restarts needs run_name in %s, or it is not known which run to continue", config)
        return USER_ERROR
    run = Path(str(settings.get("output_dir", "."))).expanduser() / str(settings.get("run_name", ""))
    start = ["--config", str(config), *arguments]
    fruitless = 0
    for restart in range(restarts + 1):
        before = _newest_checkpoint(run)
        code = ranks.run(start, count)
        if code != FAILED or ranks.told_to_stop or restart == restarts:
            return code
        fruitless = fruitless + 1 if _newest_checkpoint(run) == before else 0
        if fruitless == FRUITLESS_STARTS:
            log.error("%d accidents in a row without a new checkpoint in %s: it is not started again", fruitless, run)
            return code
        pause = min(MOST_SECONDS_BETWEEN, 2.0**restart)
        log.warning("an accident: starting again from the last checkpoint in %.0f s (%d of %d)", pause, restart + 1, restarts)
        end = time.monotonic() + pause
        while time.monotonic() < end and not ranks.told_to_stop:
            time.sleep(0.1)
        if ranks.told_to_stop:
            return RUN_AGAIN
        start = ["--config", str(config), *arguments, "--resume", "latest-or-new"]
    raise AssertionError("the last start returns")


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/local", description="Train on the GPUs of this machine.")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes, one per GPU (default: all GPUs)")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="starts after accidents (default: none)")
    parser.add_argument("config", type=Path, help="the run's TOML file; what follows goes to train.py")
    options, arguments = parser.parse_known_args()
    # A time limit counts from here, not from each start.
    os.environ.setdefault(JOB_START[0], os.environ.get(JOB_START[1]) or str(time.time()))
    count = options.gpus or _num_gpus() or int(str(_settings(options.config, arguments).get("pipeline_stages", 1)))
    return train(Ranks(), options.config, arguments, count, options.restarts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="launch: %(message)s")
    sys.exit(main())
