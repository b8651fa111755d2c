"""Files that ask a running training for something."""

import time

import pytest

from utils.requests import FILES, LOOK_SECONDS, Requests
from utils.stopping import Stopper, Wishes


@pytest.fixture
def clock():
    now = [100.0]

    def read() -> float:
        return now[0]

    read.go = lambda seconds: now.__setitem__(0, now[0] + seconds)
    return read


def test_a_file_is_a_wish_until_it_is_begun_and_is_removed_when_it_is_done(tmp_path, clock):
    requests = Requests(tmp_path, clock)
    assert requests.look() == Wishes()
    for name in FILES.values():
        (tmp_path / name).touch()
    assert requests.look() == Wishes(), "the disk is looked at once a second"
    clock.go(LOOK_SECONDS)
    wishes = requests.look()
    assert wishes == Wishes(checkpoint="the file request-checkpoint", export="the file request-export")
    assert requests.look() == wishes

    requests.begun("checkpoint", 7)
    clock.go(LOOK_SECONDS)
    assert requests.look() == Wishes(export=wishes.export)
    requests.done("checkpoint", 6)  # one that was begun before
    assert (tmp_path / "request-checkpoint").exists()
    requests.done("checkpoint", 7)
    assert not (tmp_path / "request-checkpoint").exists()
    requests.done("export", 7)
    assert (tmp_path / "request-export").exists(), "nothing was begun"

    (tmp_path / "request-checkpoint").touch()
    clock.go(LOOK_SECONDS)
    assert requests.look().checkpoint, "it can be asked for again"


def test_a_file_that_comes_while_something_is_saved_is_for_the_next_time(tmp_path, clock):
    requests = Requests(tmp_path, clock)
    requests.look()
    (tmp_path / "request-checkpoint").touch()
    requests.begun("checkpoint", 3)
    requests.done("checkpoint", 3)
    clock.go(LOOK_SECONDS)
    assert requests.look().checkpoint


def test_a_file_that_is_taken_back_asks_for_nothing(tmp_path, clock):
    requests = Requests(tmp_path, clock)
    (tmp_path / "request-export").touch()
    assert requests.look().export
    (tmp_path / "request-export").unlink()
    clock.go(LOOK_SECONDS)
    assert requests.look() == Wishes()


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_stop_is_asked_for_from_wherever_the_run_is_and_its_file_goes_when_it_has_ended(tmp_path, when):
    stopper, file = Stopper(), tmp_path / "request-stop"
    if when == "before":
        file.touch()
    Requests(tmp_path).watch(stopper)
    if when == "later":
        assert not stopper.asked()
        file.touch()
        deadline = time.monotonic() + 30
        while not stopper.asked() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stopper.wishes() == Wishes(finish="the file request-stop"), "as a stop it would be started again"
    assert file.exists()
    stopper.obeyed()
    assert not file.exists()


def test_the_end_of_a_run_leaves_nothing_to_ask_for(tmp_path):
    requests = Requests(tmp_path)
    for name in FILES.values():
        (tmp_path / name).touch()
    requests.finished()
    assert [file.name for file in tmp_path.iterdir()] == ["request-stop"], "that one is the stopper's to end"
