"""Reading checkpoints: damage of every kind is found and named, an old format is read, a future one is not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.utils.checkpoints.runs import NAMES, assert_is_of_step, manager, save
from utils.checkpoints.checkpoint import Checkpoint, Progress, differences, sealed
from utils.errors import UserError

FORMAT_1 = Path(__file__).parent / "format_1" / "step-00000002"
"""Written by the program when that was its format: two stages, a LoRA of rank 1, AdamW."""


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes) -> None:
    """Change the manifest as someone who knows its checksum would."""
    manifest = json.loads(path.read_text())
    manifest.pop("checksum", None)
    path.write_text(sealed({**manifest, **changes}))


DAMAGE = {
    "a bit of the weights": ("weights-000-000.safetensors", lambda path: flip_a_bit(path, -1), "does not have the content"),
    "a bit of a header": ("optimizer-000-000.safetensors", lambda path: flip_a_bit(path, 20), "does not have the content"),
    "cut": ("weights-000-000.safetensors", lambda path: os.truncate(path, 100), "has 100 bytes instead of"),
    "grown": ("weights-000-000.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes instead of"),
    "missing": ("optimizer-000-000.safetensors", Path.unlink, "is missing"),
    "no manifest": ("manifest.json", Path.unlink, "is missing"),
    "an empty manifest": ("manifest.json", lambda path: path.write_text(""), "cannot be read"),
    "a cut manifest": ("manifest.json", lambda path: os.truncate(path, path.stat().st_size - 20), "cannot be read"),
    "a manifest that is a list": ("manifest.json", lambda path: path.write_text("[]"), "cannot be read"),
    "no text in the manifest": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    "another number in the manifest": (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"epoch_samples": 6', '"epoch_samples": 7')),
        "does not have the content",
    ),
    "a manifest of the future": (
        "manifest.json",
        lambda path: rewrite(path, version=99),
        "written by a newer flowstage (format 99",
    ),
    "a manifest that names another file": (
        "manifest.json",
        lambda path: rewrite(path, files={"../../secret": {"bytes": 1, "sha256": ""}}),
        "is no name of a file in a checkpoint",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_newest_whole_one_is_taken(tmp_path, case, caplog):
    name, damage, expected = DAMAGE[case]
    checkpoints = manager(tmp_path)
    for step in (3, 6):
        save(checkpoints, step)
    damaged = checkpoints.folder / "step-00000006"
    damage(damaged / name)
    [problem] = Checkpoint(damaged).problems()
    assert expected in problem
    assert name in problem or "secret" in problem
    found = checkpoints.latest()
    assert_is_of_step(found, 3)
    assert "checkpoint step-00000006 is damaged and is passed over:\n  - " in caplog.text
    with pytest.raises(UserError, match=r"this checkpoint is damaged \(the newest whole one is .*step-00000003\)"):
        checkpoints.at(damaged)


def test_several_damaged_files_are_told_at_once(tmp_path):
    checkpoints = manager(tmp_path)
    folder = save(checkpoints, 1).path
    (folder / "weights-000-000.safetensors").unlink()
    flip_a_bit(folder / "optimizer-000-000.safetensors", -1)
    assert len(Checkpoint(folder).problems()) == 2
    assert Checkpoint(folder).problems(quick=True) == ["weights-000-000.safetensors is missing"]
    assert checkpoints.latest() is None


def test_a_quick_look_finds_everything_but_changed_bytes(tmp_path):
    checkpoints = manager(tmp_path)
    folder = save(checkpoints, 1).path
    flip_a_bit(folder / "weights-000-000.safetensors", -1)
    assert Checkpoint(folder).problems(quick=True) == []
    assert Checkpoint(folder).problems()


def test_format_1_is_read_and_its_damage_found(tmp_path):
    checkpoint = Checkpoint(FORMAT_1)
    assert checkpoint.problems() == []
    assert checkpoint.progress == Progress(step=2, epoch=0, epoch_samples=2, samples=2)
    names = list(checkpoint.manifest["optimizer"])
    assert len(names) == 16
    weights = checkpoint.weights(names)
    tensors, scalars = checkpoint.optimizer(names)
    for name in names:
        assert torch.count_nonzero(weights[name])
        assert tensors[f"{name}::exp_avg"].shape == weights[name].shape
        assert tensors[f"{name}::step"] == 2
        assert scalars[name]["optimizer"] == "AdamW"
    assert checkpoint.kinds() == ["weights", "optimizer"]
    assert checkpoint.scalars("ema") == {}
    assert checkpoint.eval_loss is None
    assert checkpoint.record["settings"]["adapter"]["rank"] == 1

    copied = Checkpoint(Path(shutil.copytree(FORMAT_1, tmp_path / "step-00000002")))
    flip_a_bit(copied.folder / "weights-001.safetensors", 1000)
    assert copied.problems() == ["weights-001.safetensors does not have the content it was written with"]


def test_missing_weights_are_an_error_and_missing_state_is_left_out(tmp_path):
    checkpoint = Checkpoint(save(manager(tmp_path), 1).path)
    with pytest.raises(UserError, match=r"holds no weight 'other' \(1 are missing\)"):
        checkpoint.weights([NAMES[0], "other"])
    tensors, _ = checkpoint.optimizer(["other"])
    assert tensors == {}


def test_steps_are_in_order_beyond_their_eight_digits(tmp_path):
    checkpoints = manager(tmp_path)
    for step in (99_999_999, 100_000_000):
        save(checkpoints, step)
    assert checkpoints.latest().progress.step == 100_000_000


def test_differences_of_nested_settings():
    before, now = {"a": {"b": 1, "c": [1]}, "d": 2, "e": 3}, {"a": {"b": 1, "c": [2]}, "d": 2, "f": 4}
    assert differences(before, now) == [("a.c", [1], [2]), ("e", 3, None), ("f", None, 4)]
