"""When a step is taken for hung.  What the watchdog does then, and when ranks vanish, is in tests/distributed/test_stopping.py."""

import time
from types import SimpleNamespace

import pytest
import torch

from utils.config.schema import LimitsConfig
from utils.control import ALIVE
from utils.stopping import Stopped, Stopper
from utils.topology import Topology
from utils.watchdog import HANG_FACTOR, LEAST_HANG_SECONDS, LEAST_SILENCE_SECONDS, UNMEASURED_STEPS, Watchdog


@pytest.fixture
def watchdog():
    def make(limits: LimitsConfig | None = None, stopper: Stopper | None = None) -> Watchdog:
        return Watchdog(Topology(0, 1, 1, torch.device("cpu"), {}, {}, None), stopper or Stopper(), limits)

    return make


def test_the_first_steps_are_not_measured(watchdog):
    with watchdog(LimitsConfig(hang_timeout="5s")) as watch:
        for number in range(UNMEASURED_STEPS):
            with watch.step(number):
                assert watch.limit is None
        assert watch.longest_step == 0
        with watch.step(UNMEASURED_STEPS):
            pass
        assert watch.limit == 5


def test_without_a_setting_it_is_a_multiple_of_the_usual_step(watchdog):
    with watchdog() as watch:
        watch._seconds.extend([1.0, 2.0, 3.0])
        assert watch.limit == LEAST_HANG_SECONDS
        watch._seconds.extend([100.0, 100.0, 100.0, 5000.0])
        assert watch.limit == HANG_FACTOR * 100.0
        assert watch.longest_step == 5000.0


def test_the_phase_names_where_the_run_is(watchdog):
    with watchdog() as watch:
        assert watch.phase == "start-up"
        watch.safe_point("encoding")
        assert watch.phase == "encoding"
        with watch.step(12):
            assert watch.phase == "step 12"
        assert watch.phase == "the time after step 12"


def test_a_rank_is_silent_only_while_this_one_listens(watchdog, monkeypatch):
    """What the watching thread does is done here, with a second rank that there is not."""
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    with watchdog(LimitsConfig(hang_timeout="30s")) as watch:
        watch.line.hosts, hangs = ["here", "there"], []
        watch._hangs = hangs.append
        alive = {"kind": ALIVE, "rank": 1, "phase": "loading the weights"}
        watch._handlers[ALIVE](alive)
        watch._listen(29)
        watch._handlers[ALIVE](alive)
        watch._listen(29)
        assert not hangs
        watch._listen(2)
        assert hangs == [
            "rank 1 (stage 1, host there) has given no sign of life for 30 s, during loading the weights: "
            "its process is stopped, or its machine is frozen or swaps"
        ]
        hangs.clear()
        watch._handlers["bye"]({"kind": "bye", "rank": 1})
        watch._listen(1000)
        assert not hangs, "it has ended"


def test_whom_rank_0_waits_for_is_told_now_and_then(watchdog, monkeypatch, caplog):
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    with watchdog() as watch:
        watch.line.hosts = ["here", "there", "there"]
        for rank, phase in ((1, "the wait after start-up"), (2, "loading the weights")):
            watch._handlers[ALIVE]({"kind": ALIVE, "rank": rank, "phase": phase})
        monkeypatch.setattr(Topology, "gather", lambda self, value: [watch._notice(time.monotonic() + 601), value][1:])
        watch.safe_point("encoding")
        [told] = caplog.messages
        assert told == "10 minutes of waiting: rank 2 (stage 2, host there) is at loading the weights"
        watch._notice(time.monotonic() + 3600)
        assert len(caplog.messages) == 1, "it does not wait any more"


def test_a_pause_of_its_own_is_nobodys_silence(watchdog, monkeypatch):
    """As when a job is suspended and goes on: all ranks were stopped, and this one is the first to look."""
    watches = Watchdog._watch
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    with watchdog(LimitsConfig(hang_timeout="30s")) as watch, monkeypatch.context() as patched:
        clock, hangs = [0.0], []

        def goes_by(seconds: list[float]) -> None:
            """The thread's loop, in which so much time goes by between two looks."""

            def receive(timeout: float) -> list:
                clock[0] += seconds.pop(0)
                watch._closing = not seconds
                return []

            watch._closing = False
            watch.line.receive = receive
            watches(watch)

        patched.setattr("utils.watchdog.time", SimpleNamespace(monotonic=lambda: clock[0]))
        watch.line.hosts, watch._hangs = ["here", "there"], hangs.append
        watch._handlers[ALIVE]({"kind": ALIVE, "rank": 1, "phase": "encoding"})
        goes_by([1.0, 3600.0, 1.0, 1.0])
        assert not hangs
        goes_by([1.0] * 30)
        assert hangs


@pytest.mark.parametrize(("timeout", "limit"), [(None, LEAST_HANG_SECONDS), ("30m", 1800), ("1s", LEAST_SILENCE_SECONDS)])
def test_how_long_silence_may_last(watchdog, timeout, limit):
    with watchdog(LimitsConfig(hang_timeout=timeout)) as watch:
        assert watch.silence_limit == limit


def test_a_step_that_fails_is_not_watched_any_more(watchdog):
    with watchdog(LimitsConfig(hang_timeout="1s")) as watch:
        watch._seconds.append(1.0)
        with pytest.raises(RuntimeError), watch.step(12):
            raise RuntimeError("out of memory")
        assert watch._deadline is None


def test_a_wish_from_before_stops_at_the_next_safe_point(watchdog):
    stopper = Stopper()
    stopper.ask("SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM"), watchdog(stopper=stopper) as watch:
        watch.safe_point("encoding")
