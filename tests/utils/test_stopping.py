"""Wishes of several ranks, the time limit, and signals that come while the main thread is stuck."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.stopping import DONE, LEAST_MARGIN_SECONDS, RUN_AGAIN, Stopped, Stopper, Wishes

ROOT = Path(__file__).resolve().parents[2]


def test_what_one_rank_asks_for_all_do():
    assert Wishes.of_all([Wishes(), Wishes()]) == Wishes()
    ranks = [Wishes(export="a file"), Wishes(stop="SIGTERM"), Wishes(stop="the time limit", checkpoint="minutes")]
    agreed = Wishes.of_all(ranks)
    assert agreed == Wishes(stop="SIGTERM", checkpoint="minutes", export="a file")
    assert agreed.ends == "SIGTERM"
    assert Wishes(finish="a file").ends == "a file"
    assert not Wishes(checkpoint="minutes", export="a file").ends


def test_the_first_reason_stays_and_is_told_once():
    stopper, told = Stopper(), []
    stopper.connect(lambda *wish: told.append(wish), " on rank 1")
    assert stopper.asked() == ""
    stopper.ask("SIGTERM")
    stopper.ask("SIGUSR1")
    stopper.hear("stop", "SIGTERM on rank 3")
    assert stopper.asked() == "SIGTERM on rank 1"
    assert told == [("stop", "SIGTERM on rank 1")]


def test_what_was_asked_before_there_was_a_line_is_told_when_there_is_one():
    stopper, told = Stopper(), []
    stopper.ask("SIGTERM")
    stopper.connect(lambda *wish: told.append(wish), " on rank 1")
    assert told == [("stop", "SIGTERM on rank 1")]


def test_an_end_for_good_is_another_wish_and_a_signal_goes_before_it():
    stopper, told, done = Stopper(), [], []
    stopper.connect(lambda *wish: told.append(wish), " on rank 0")
    stopper.ask("a file", "finish", obeyed=lambda: done.append("removed"))
    assert stopper.asked() == "a file"
    assert Stopped.by(stopper.wishes()).exit_code == DONE
    stopper.hear("stop", "SIGTERM on rank 3")
    assert stopper.wishes() == Wishes(stop="SIGTERM on rank 3", finish="a file")
    stopped = Stopped.by(stopper.wishes())
    assert (str(stopped), stopped.exit_code) == ("SIGTERM on rank 3", RUN_AGAIN)
    assert told == [("finish", "a file")]
    assert not done
    stopper.obeyed()
    assert done == ["removed"]


def test_another_ranks_reason_is_not_told_again():
    stopper, told = Stopper(), []
    stopper.connect(lambda *wish: told.append(wish), " on rank 1")
    stopper.hear("stop", "SIGTERM on rank 3")
    stopper.hear("stop", "SIGUSR1 on rank 4")
    assert stopper.asked() == "SIGTERM on rank 3"
    assert told == []


@pytest.mark.parametrize("variable", ["FLOWSTAGE_JOB_START", "SLURM_JOB_START_TIME"])
def test_the_time_limit_counts_from_the_start_of_the_job_and_leaves_time_to_save(variable):
    def stopper(age: float) -> Stopper:
        made = Stopper()
        made.limit(1000, {variable: str(time.time() - age)})
        return made

    assert not stopper(age=1000 - LEAST_MARGIN_SECONDS - 20).asked()
    assert "the time limit of 1000 s is 60 s away" in stopper(age=1000 - LEAST_MARGIN_SECONDS + 1).asked()

    slow = stopper(age=700)
    slow.needs(200)
    assert not slow.asked()
    slow.needs(400)
    assert "is 400 s away" in slow.asked()
    quick = stopper(age=900)
    quick.needs(1)
    assert quick.margin == LEAST_MARGIN_SECONDS


def test_without_a_job_it_counts_from_the_start_of_the_process():
    stopper = Stopper()
    stopper.limit(LEAST_MARGIN_SECONDS + 3600, {})
    assert not stopper.asked()


# The main thread is in a call that no signal interrupts, as in a collective.
STUCK = """
import hashlib, sys
from utils.stopping import Stopper
stopper = Stopper()
stopper.connect(lambda wish, reason: print(reason, flush=True), "")
stopper.listen()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.fixture
def stuck():
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_signal_is_noticed_while_the_main_thread_is_stuck(stuck):
    stuck.send_signal(signal.SIGTERM)
    assert stuck.stdout.readline() == "SIGTERM\n"
    assert stuck.poll() is None


def test_the_second_interrupt_ends_it_and_one_that_comes_twice_does_not(stuck):
    stuck.send_signal(signal.SIGINT)
    assert stuck.stdout.readline() == "SIGINT\n"
    stuck.send_signal(signal.SIGINT)  # a launcher forwards what the terminal has sent already
    with pytest.raises(subprocess.TimeoutExpired):
        stuck.wait(1.2)
    stuck.send_signal(signal.SIGINT)
    assert stuck.wait(30) == 130
    assert "ending at once" in stuck.stderr.read()
