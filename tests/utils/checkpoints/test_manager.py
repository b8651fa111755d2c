"""Saving beside training, and what is kept."""

import json
import threading
from pathlib import Path

import pytest
import torch

from tests.utils.checkpoints.runs import NAMES, RECORD, assert_is_of_step, manager, save, state_of
from utils.checkpoints import manager as manager_module
from utils.checkpoints.checkpoint import Checkpoint, Progress
from utils.checkpoints.disk import Disk
from utils.checkpoints.host_copy import HostCopy, available_host_bytes
from utils.checkpoints.retention import Retention


class HeldDisk(Disk):
    """Nothing is synced before it is released."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def sync(self, file) -> None:
        self.reached.set()
        assert self.released.wait(60)
        super().sync(file)


def steps_in(run: Path) -> list[int]:
    return [checkpoint.named_step for checkpoint in manager(run).all()]


def test_it_holds_the_values_of_the_moment_and_is_written_beside_training(tmp_path):
    disk = HeldDisk()
    checkpoints = manager(tmp_path, disk=disk)
    groups, scalars = state_of(5)
    checkpoints.save(Progress(5, epoch_samples=5, samples=5), groups, scalars, RECORD)
    for tensors in groups.values():
        for tensor in tensors.values():
            tensor.zero_()  # training goes on
    assert disk.reached.wait(60)
    assert checkpoints.poll() == []
    assert checkpoints.all() == [], "it has no name before it is whole"
    disk.released.set()
    folder = checkpoints.finish()
    assert folder == tmp_path / "checkpoints" / "step-00000005"
    assert_is_of_step(Checkpoint(folder), 5)
    [saved] = checkpoints.poll()
    assert (saved.path, saved.errors, saved.step) == (folder, [], 5)
    assert saved.bytes == sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
    assert checkpoints.poll() == []


def test_the_next_one_waits_for_the_one_before_and_uses_its_memory(tmp_path):
    disk = HeldDisk()
    checkpoints = manager(tmp_path, disk=disk)
    groups, scalars = state_of(1)
    checkpoints.save(Progress(1, epoch_samples=1, samples=1), groups, scalars, RECORD)
    assert disk.reached.wait(60)
    memory = checkpoints._copy._memory.data_ptr()
    second = threading.Thread(target=save, args=(checkpoints, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it did not wait"
    disk.released.set()
    second.join(60)
    assert checkpoints._copy._memory.data_ptr() == memory
    for checkpoint, step in zip(checkpoints.all(), (1, 2), strict=True):
        assert_is_of_step(checkpoint, step)


def test_any_kinds_of_tensors_any_dtypes_and_strides(tmp_path):
    ema = {
        "a": torch.arange(12.0).view(3, 4).t(),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(True),
        "d": torch.randn(5).to(torch.float8_e4m3fn),
        "e": torch.arange(3, dtype=torch.int64),
    }
    checkpoints = manager(tmp_path)
    checkpoints.save(Progress(1), {"weights": {}, "ema": ema}, {"ema": {"updates": 4}}, {})
    checkpoint = Checkpoint(checkpoints.finish())
    assert checkpoint.problems() == []
    assert checkpoint.kinds() == ["weights", "ema"]
    found = checkpoint.tensors("ema", ema)
    assert found.keys() == ema.keys()
    for name, tensor in ema.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert checkpoint.scalars("ema") == {"updates": 4}
    assert checkpoint.tensors("ema", ["a"]).keys() == {"a"}
    assert checkpoint.tensors("optimizer", ema) == {}


def test_without_memory_for_a_copy_it_is_written_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(manager_module, "available_host_bytes", lambda: 10)
    checkpoints = manager(tmp_path)
    groups, scalars = state_of(3)
    checkpoints.save(Progress(3, epoch_samples=3, samples=3), groups, scalars, RECORD)
    assert_is_of_step(checkpoints.all()[0], 3)
    assert "no host memory for a copy" in caplog.text


def test_memory_that_the_system_calls_available():
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < available_host_bytes() < int(found["MemTotal"].split()[0]) * 1024


def test_host_memory_grows_only_when_it_must():
    copy = HostCopy()
    groups, _ = state_of(1)
    assert copy.growth(groups) > 0
    assert copy.make_room(groups)
    assert copy.growth(groups) == 0
    assert copy.growth({"weights": groups["weights"]}) == 0
    assert copy.growth({**groups, "ema": groups["weights"]}) > 0


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_copied_through_page_locked_memory(tmp_path):
    """Many tensors of many sizes, some on the host; changed on the GPU right after the copy."""
    groups, scalars = state_of(5)
    large = torch.arange(2**24, dtype=torch.float32, device="cuda")
    groups = {kind: {name: tensor.cuda() for name, tensor in tensors.items()} for kind, tensors in groups.items()}
    groups["optimizer"][f"{NAMES[0]}::step"] = groups["optimizer"][f"{NAMES[0]}::step"].cpu()
    checkpoints = manager(tmp_path)
    checkpoints.save(Progress(5, epoch_samples=5, samples=5), {**groups, "ema": {"large": large}}, scalars, RECORD)
    assert checkpoints._copy._memory.is_pinned()
    for tensor in (large, *groups["weights"].values(), *groups["optimizer"].values()):
        tensor.zero_()
    checkpoint = Checkpoint(checkpoints.finish())
    assert_is_of_step(checkpoint, 5)
    assert torch.equal(checkpoint.tensors("ema", ["large"])["large"], torch.arange(2**24, dtype=torch.float32))


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    checkpoints = manager(tmp_path)
    save(checkpoints, 4)
    groups, scalars = state_of(4)
    checkpoints.save(Progress(4), groups, scalars, {})
    assert checkpoints.finish() is not None
    assert checkpoints.poll() == []

    resumed = manager(tmp_path)
    resumed.resumed_from(resumed.latest())
    resumed.save(Progress(4), groups, scalars, {})
    assert resumed.poll() == []
    assert resumed.finish() == tmp_path / "checkpoints" / "step-00000004"

    # That of another run is no checkpoint of this one.
    other = manager(tmp_path / "other")
    other.resumed_from(checkpoints.latest())
    assert save(other, 4).path == tmp_path / "other" / "checkpoints" / "step-00000004"


def test_a_disk_without_room_costs_this_checkpoint_and_says_how_much_is_needed(tmp_path):
    class SmallDisk(Disk):
        free = 10**9

        def free_bytes(self, folder: Path) -> int:
            return self.free

    disk = SmallDisk()
    checkpoints = manager(tmp_path, Retention(last=1), disk)
    save(checkpoints, 1)
    disk.free = 1000
    saved = save(checkpoints, 2)
    assert saved.path is None
    [error] = saved.errors
    assert "no room: 1 MB are needed in" in error
    assert "0 MB are free" in error
    assert steps_in(tmp_path) == [1], "an older one was given up for it"
    disk.free = 10**9
    assert save(checkpoints, 2).path, "the same step, when there is room again"
    assert steps_in(tmp_path) == [2]


def test_a_read_only_folder_costs_this_checkpoint(tmp_path):
    checkpoints = manager(tmp_path)
    save(checkpoints, 1)

    class ReadOnly(Disk):
        def mkdir(self, folder: Path) -> None:
            raise OSError(30, "Read-only file system", str(folder))

    checkpoints = manager(tmp_path, disk=ReadOnly())
    saved = save(checkpoints, 2)
    assert saved.path is None
    assert "rank 0 (stage 0): [Errno 30] Read-only file system" in saved.errors[0]
    assert_is_of_step(manager(tmp_path).latest(), 1)


def test_what_is_no_error_of_the_disk_is_no_end_of_the_run_either(tmp_path):
    checkpoints = manager(tmp_path)
    groups, _ = state_of(1)
    checkpoints.save(Progress(1), groups, {}, {"settings": object()})
    checkpoints.finish()
    [saved] = checkpoints.poll()
    assert "TypeError" in saved.errors[0]
    assert list(checkpoints.folder.iterdir()) == []


# ── retention ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("retention", "kept"),
    {
        "all": (Retention(), [1, 2, 3, 5, 7, 8, 11, 12]),
        "the last two": (Retention(last=2), [11, 12]),
        "and of every five steps the first": (Retention(last=1, every_n_steps=5), [5, 11, 12]),
        "and the two best": (Retention(last=1, best=2), [3, 8, 12]),
        "all of these": (Retention(last=2, every_n_steps=4, best=1), [5, 8, 11, 12]),
    }.values(),
)
def test_what_is_kept(tmp_path, retention, kept):
    """Held-out losses of some steps; the last one was measured and is no number."""
    losses = {1: 0.9, 3: 0.5, 8: 0.25, 12: float("nan")}
    checkpoints = manager(tmp_path, retention)
    for step in (1, 2, 3, 5, 7, 8, 11, 12):
        save(checkpoints, step, {"one": losses[step], "other": losses[step] + 1} if step in losses else {})
        assert checkpoints.all()[-1].named_step == step
    assert steps_in(tmp_path) == kept
    for checkpoint in checkpoints.all():
        assert_is_of_step(checkpoint, checkpoint.named_step)
    assert {path.name for path in checkpoints.folder.iterdir()} == {f"step-{step:08d}" for step in kept}
    if 3 in kept:
        assert checkpoints.all()[kept.index(3)].eval_loss == 1.0


def test_damaged_ones_and_those_set_aside_are_not_removed_and_not_counted(tmp_path):
    checkpoints = manager(tmp_path, Retention(last=2))
    for step in (1, 2):
        save(checkpoints, step)
    (checkpoints.folder / "step-00000002" / "optimizer-000-000.safetensors").unlink()
    (checkpoints.folder / "set-aside-step-00000009").mkdir()
    save(checkpoints, 3)
    assert steps_in(tmp_path) == [1, 2, 3]
    save(checkpoints, 4)
    assert steps_in(tmp_path) == [2, 3, 4]
    assert (checkpoints.folder / "set-aside-step-00000009").is_dir()


def test_an_older_one_that_cannot_be_removed_costs_nothing(tmp_path):
    class Sticky(Disk):
        def rmdir(self, folder: Path) -> None:
            raise OSError(16, "Device or resource busy", str(folder))

    checkpoints = manager(tmp_path, Retention(last=1), Sticky())
    save(checkpoints, 1)
    saved = save(checkpoints, 2)
    assert saved.path
    assert "could not be removed: [Errno 16]" in saved.notes[0]
    assert steps_in(tmp_path) == [2]
    manager(tmp_path).remove_leftovers()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


# ── a run that goes back ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_later_ones_are_set_aside_under_names_that_are_free(tmp_path):
    checkpoints = manager(tmp_path)
    for _ in range(2):
        for step in (1, 2, 3):
            if not (checkpoints.folder / f"step-{step:08d}").exists():
                save(manager(tmp_path), step)
        checkpoints.set_aside_others(checkpoints.at(checkpoints.folder / "step-00000001"))
    names = {"set-aside-step-00000002", "set-aside-step-00000002.2", "set-aside-step-00000003", "set-aside-step-00000003.2"}
    assert {path.name for path in checkpoints.set_aside()} == names
    assert steps_in(tmp_path) == [1]

    # One that was set aside is resumed: another one of its step would be taken for it.
    save(manager(tmp_path), 2)
    again = checkpoints.at(checkpoints.folder / "set-aside-step-00000002")
    checkpoints.set_aside_others(again)
    assert steps_in(tmp_path) == [1]
    assert again.folder.is_dir()


def test_the_manifest_says_who_wrote_it_and_holds_no_path(tmp_path):
    checkpoints = manager(tmp_path)
    save(checkpoints, 1, {"held-out": 0.5})
    manifest = json.loads((checkpoints.folder / "step-00000001" / "manifest.json").read_text())
    assert manifest["written_by"].items() >= {"stages": 1, "replicas": 1}.items()
    assert manifest["eval_losses"] == {"held-out": 0.5}
    assert str(tmp_path) not in json.dumps(manifest)
    assert sorted(manifest["files"]) == ["optimizer-000-000.safetensors", "weights-000-000.safetensors"]
    assert set(NAMES) == manifest["scalars"]["optimizer"].keys()
