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
