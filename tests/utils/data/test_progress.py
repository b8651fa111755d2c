import logging

from utils.data.progress import ProgressLog


def test_lines_tell_done_total_and_time_left(caplog):
    with caplog.at_level(logging.INFO):
        progress = ProgressLog("reading", 10, every=0)
        progress.report(2)  # what was there already says nothing about the speed
        progress.report(3)
    assert caplog.messages == ["reading: 2 of 10", "reading: 3 of 10, 0 s left"]


def test_quick_work_is_silent(caplog):
    with caplog.at_level(logging.INFO):
        progress = ProgressLog("reading", 10, every=3600)
        for done in range(10):
            progress.report(done)
    assert not caplog.messages


def test_time_left_is_by_the_share_of_the_work(caplog, monkeypatch):
    """The largest things are done first: the last half of them takes a tenth of the time."""
    now = 100.0
    monkeypatch.setattr("utils.data.progress.time.monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        progress = ProgressLog("encoding", 10)
        progress.report(0, 0.0)
        now = 190.0
        progress.report(5, 0.9)
        now = 195.0
        progress.report(7, 0.95)  # too soon for another line
        now = 7300.0
        progress.report(8, 0.96)
    assert caplog.messages == ["encoding: 5 of 10, 10 s left", "encoding: 8 of 10, 5 min left"]
