"""``python -m utils.checkpoints``: what it tells and what it removes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.utils.checkpoints.runs import manager, save
from tests.utils.checkpoints.test_checkpoint import FORMAT_1, flip_a_bit
from utils.checkpoints.__main__ import main


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints of steps 2, 4, 6 and 8, of which 6 is damaged, one that was set aside, and leftovers of two ages."""
    folder = tmp_path / "run"
    checkpoints = manager(folder)
    for step, losses in {2: {}, 4: {"held-out": 0.25}, 6: {}, 8: {"held-out": 0.5}}.items():
        save(checkpoints, step, losses)
    flip_a_bit(checkpoints.folder / "step-00000006" / "weights-000-000.safetensors", -1)
    save(manager(tmp_path / "other"), 9)
    (tmp_path / "other" / "checkpoints" / "step-00000009").rename(checkpoints.folder / "set-aside-step-00000009")
    for name, age in {".partial-1-step-00000005": 7200, ".partial-2-step-00000010": 1}.items():
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "weights-000-000.safetensors").write_bytes(bytes(1000))
        for path in (checkpoints.folder / name / "weights-000-000.safetensors", checkpoints.folder / name):
            os.utime(path, (time.time() - age, time.time() - age))
    (folder / "config.toml").write_text('seed = 8\nrun_name = "run"\ndataset = "data/dataset.toml"\nmax_steps = 5\n')
    return folder


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def called(capsys, *arguments: str | Path, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    out, error = capsys.readouterr()
    return error if code == 2 else out


def test_ls(run, capsys):
    said = called(capsys, "ls", run)
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert "1 stages x 1 replicas" in lines["step-00000004"]
    assert "0.25000" in lines["step-00000004"]
    assert " 4 " in lines["step-00000004"]
    assert "whole" in lines["step-00000002"]
    assert "0.2" not in lines["step-00000002"]
    assert lines["set-aside-step-00000009"].endswith("whole")
    assert "left by a process that was stopped" in lines[".partial-1-step-00000005"]
    (run / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    assert "manifest.json is missing" in called(capsys, "ls", run / "checkpoints")


def test_verify(run, capsys):
    said = called(capsys, "verify", run, code=1)
    assert "step-00000002: whole\nstep-00000004: whole\nstep-00000006: DAMAGED:\n  - weights-000-000.safetensors does not" in said
    assert called(capsys, "verify", run / "checkpoints" / "step-00000008") == "step-00000008: whole\n"
    assert called(capsys, "verify", FORMAT_1) == "step-00000002: whole\n"


def test_show(run, capsys):
    said = called(capsys, "show", run, "--step", "4")
    assert "step 4, epoch 1, 4 samples" in said
    assert "eval loss of held-out: 0.25000" in said
    assert "weights: 2 tensors, 24 numbers, float32 in 1 files" in said
    assert "optimizer: 6 tensors, 50 numbers, bfloat16, float32 in 1 files" in said
    assert "settings, against the run's config.toml:\n  seed: here 7, there 8\n  max_steps: here not set, there 5\n" in said
    assert "dataset" not in said
    assert "step 8" in called(capsys, "show", run), "the newest"
    assert "against that of step 2: no difference" in called(capsys, "show", run, "--against", "2")
    assert "there is no checkpoint of step 5; there are those of 2, 4, 6, 8" in called(capsys, "show", run, "--step", "5", code=2)
    assert "adapter.rank" not in called(capsys, "show", FORMAT_1)
    assert "16 tensors" in called(capsys, "show", FORMAT_1)


def test_prune_tells_and_then_does(run, capsys):
    before = names(run)
    told = called(capsys, "prune", run, "--keep-last", 1, "--keep-best", 1, "--dry-run")
    assert names(run) == before
    done = called(capsys, "prune", run, "--keep-last", 1, "--keep-best", 1)
    assert done == told.replace("would be", "was").replace("was freed", "freed")
    assert done.endswith("kept: step-00000004, step-00000006, step-00000008\n"), "a damaged one is not counted"
    assert "step-00000002 was removed: not wanted any more" in done
    assert ".partial-1-step-00000005 was removed: left by a process that was stopped, 1.0 kB" in done
    assert ".partial-2-step-00000010 stays: it was changed within the last hour" in done
    kept = {"step-00000004", "step-00000006", "step-00000008", "set-aside-step-00000009", ".partial-2-step-00000010"}
    assert names(run) == kept


def test_prune_removes_the_damaged_and_what_was_set_aside_only_when_told(run, capsys):
    before = names(run)
    called(capsys, "prune", run)
    assert names(run) == before - {".partial-1-step-00000005"}
    said = called(capsys, "prune", run, "--keep-last", "2", "--damaged", "--set-aside")
    assert "step-00000006 was removed: damaged" in said
    assert "set-aside-step-00000009 was removed: set aside" in said
    assert names(run) == {"step-00000004", "step-00000008", ".partial-2-step-00000010"}


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert "is not the folder of a run: there is no" in called(capsys, "ls", tmp_path, code=2)


def test_keeping_none_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        main(["prune", str(run), "--keep-last", "0"])
    assert "'0' is not a whole number above 0" in capsys.readouterr().err


def test_it_is_a_program(run, process_environment):
    command = [sys.executable, "-m", "utils.checkpoints", "verify", run]
    done = subprocess.run(command, env=process_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "step-00000006: DAMAGED" in done.stdout
