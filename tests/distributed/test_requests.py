"""Files that ask a run for something, dropped at any time: before the start, between steps, and while it evaluates."""

import json

import pytest

import train
from models import load_family
from tests.distributed.harness import world
from tests.distributed.test_run import steps_of
from tests.distributed.test_stopping import lines_of
from utils.config.load import load_config
from utils.data.cache import DatasetCache
from utils.stopping import DONE, RUN_AGAIN, Stopped, Stopper

EVALUATED = 30


def test_files_ask_for_a_checkpoint_an_export_and_the_end(workspace, tiny):
    """On two stages; what nobody asked for is not written, since the run is far from its end."""
    changes = {"max_steps": 100_000, "checkpoint_every_n_steps": None, "pipeline_stages": 2, "resume": "latest-or-new"}
    changes["eval_datasets"] = [{"name": "held-out", "config": str(workspace.dataset)}]
    changes |= {"eval_every_n_steps": EVALUATED, "eval_before_first_step": False}
    config = workspace.config("run", tiny("wan-t2v"), **changes, eval_timesteps=[place / 12 for place in range(1, 12)])
    run = workspace.run("run")

    def made() -> dict[str, list[int]]:
        """The steps of the checkpoints and of the exports."""
        folders = {kind: (run / f"{kind}s").glob("step-*") for kind in ("checkpoint", "export")}
        return {kind: sorted(int(path.name.removeprefix("step-")) for path in paths) for kind, paths in folders.items()}

    def ask() -> None:
        for kind in made():
            (run / f"request-{kind}").touch()

    def is_done() -> bool:
        return not any((run / f"request-{kind}").exists() for kind in made())

    run.mkdir(parents=True)
    ask()
    with world(["train.py", "--config", config], 2, workspace.folder) as running:
        running.wait_until(lambda: (run / "metrics.jsonl").is_file() and is_done())
        assert made() == {"checkpoint": [1], "export": [1]}, "the first step comes before what would be saved"
        # While it evaluates, or soon after: the disk is looked at once a second.
        running.wait_until(lambda: lines_of(run, "step")[-1]["step"] >= EVALUATED)
        ask()
        running.wait_until(is_done)
        (first, asked), exports = made()["checkpoint"], made()["export"]
        assert first == 1
        assert asked >= EVALUATED
        assert exports == [1, asked]
        ask()
        running.wait_until(is_done)
        again = made()
        assert len(again["checkpoint"]) == len(again["export"]) == 3
        (run / "request-stop").touch()
        assert running.wait(120) == [0, 0], running.said()
        assert "stopped before the end: the file request-stop" in running.said()
    assert not (run / "request-stop").exists()
    last = steps_of(run)[-1]["step"]
    checkpoints = [*again["checkpoint"][-2:], last]
    assert made() == {"checkpoint": checkpoints, "export": again["export"]}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [event for event in events if event["kind"] == "checkpoint"]
    assert [(event["step"], event["errors"]) for event in events] == [(step, []) for step in (1, *checkpoints)]

    # The end of a run saves what there is to ask for.
    ask()
    said = workspace.train(config, "--set", f"max_steps={last + 1}", "--set", "eval_every_n_steps=100000", processes=2)
    assert f"continuing from step {last}" in said
    assert made()["export"][-1] == made()["checkpoint"][-1] == steps_of(run)[-1]["step"] == last + 1
    assert is_done()


def test_the_look_at_the_data_ends_as_it_was_asked_to(workspace, tiny, copied_clips, monkeypatch):
    """The first look at a large data set takes long: it reads every file."""
    workspace.dataset.write_text(f"resolutions = [48]\n[[directory]]\npath = {str(copied_clips)!r}\n")
    loaded = load_config(workspace.config("run", tiny("wan-t2v")), lambda name: load_family(name).Options)
    family = load_family("wan")(loaded.run.model)
    for ask, exit_code in ((("the file request-stop", "finish"), DONE), (("SIGTERM", "stop"), RUN_AGAIN)):
        monkeypatch.setattr(train, "stopper", Stopper())
        train.stopper.ask(*ask)
        with pytest.raises(Stopped, match=ask[0]) as stopped:
            train.scan_all(loaded, family, DatasetCache(workspace.folder / "cache"))
        assert stopped.value.exit_code == exit_code
