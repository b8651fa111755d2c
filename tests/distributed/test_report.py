"""``train.py --report`` from the command line."""

import sys

import pytest

import train
from tests.utils.report.reading import read_page


def test_a_page_from_the_command_line(workspace, tiny):
    page = workspace.folder / "look" / "here"
    said = workspace.train(workspace.config("run", tiny("wan-t2v")), "--report", page, "--report-items", "1")
    assert "the config is good" in said
    assert "\x1b" not in said  # a pipe gets plain text
    read = read_page(page / "index.html")
    buckets = {key.rpartition("@")[2] for key in read.order}
    assert len(read.order) == len(buckets) == len(read.links) > 1
    assert not workspace.run("run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--check", "--decode"], "--decode shows what is in the cache on the page of --report DIR"),
        (["--report", "x", "--report-items", "0"], "'0' is neither a whole number above 0 nor all"),
        (["--report", "x", "--report-items", "many"], "'many' is neither"),
    ],
)
def test_arguments_that_are_refused(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.toml", *arguments])
    with pytest.raises(SystemExit, match="2"):
        train.parse_arguments()
    assert said in capsys.readouterr().err


def test_all_samples_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.toml", "--report", "x", "--report-items", "all"])
    assert train.parse_arguments().report_items is None
