"""Every operation on the disk fails once, or is the last one: no state of the disk leaves a run without a whole checkpoint once it
had one, and what fails costs that checkpoint alone."""

import shutil
from pathlib import Path

import pytest

from tests.utils.checkpoints.faulty_disk import ERRORS, FaultyDisk, PowerOff, UnsyncedDisk, lay_out
from tests.utils.checkpoints.runs import RECORD, assert_is_of_step, manager, state_of
from utils.checkpoints.checkpoint import Progress
from utils.checkpoints.manager import CheckpointManager
from utils.checkpoints.retention import Retention
from utils.errors import UserError

# A thread that ends with the "process" is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

KEPT = 2
MIXTURES = 3


class Life:
    """What a run does to its disk: it starts, saves, removes older ones, goes back to an older one and saves again."""

    def __init__(self, run: Path, disk: FaultyDisk):
        self.run, self.disk = run, disk
        self.acknowledged: list[int] = []
        """Steps whose checkpoints were reported as written, and are still wanted."""
        self.failed: list[int] = []

    def live(self) -> "Life":
        try:
            first = self._start()
            for step in (1, 2, 3, 4):
                self._save(first, step)
            self._go_back()
        except PowerOff:
            pass
        return self

    def _start(self) -> CheckpointManager:
        checkpoints = manager(self.run, Retention(last=KEPT), self.disk)
        checkpoints.remove_leftovers()
        return checkpoints

    def _save(self, checkpoints: CheckpointManager, step: int) -> None:
        groups, scalars = state_of(step)
        checkpoints.save(Progress(step, epoch_samples=step, samples=step), groups, scalars, RECORD)
        checkpoints.finish()
        if self.disk.stopped:
            raise PowerOff
        [saved] = checkpoints.poll()
        if saved.path:
            self.acknowledged.append(step)
            newest = manager(self.run).latest()
            assert newest.named_step == step
        else:
            assert saved.errors
            self.failed.append(step)

    def _go_back(self) -> None:
        """The process before was killed while it wrote; the user resumes an older checkpoint than the newest."""
        (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
        older = manager(self.run).all()
        if len(older) < 2:
            return
        second = manager(self.run, Retention(last=KEPT), self.disk)
        resumed = second.at(older[0].folder)
        self.acknowledged = [resumed.named_step]
        try:
            second.set_aside_others(resumed)
        except UserError:
            return  # the start was refused
        second.remove_leftovers()
        self._save(second, 10)
        self._save(second, 11)


def assert_nothing_is_lost(run: Path, life: Life) -> None:
    """A new process finds what was promised, and goes on."""
    checkpoints = manager(run, Retention(last=KEPT), UnsyncedDisk())
    whole = {checkpoint.named_step: checkpoint for checkpoint in checkpoints.all() if not checkpoint.problems()}
    promised = sorted({*life.acknowledged, *whole})[-KEPT:]
    assert whole.keys() >= set(promised), f"of {promised} there are only {list(whole)}"
    for step, checkpoint in whole.items():
        assert_is_of_step(checkpoint, step)
    checkpoints.remove_leftovers()
    assert checkpoints.leftovers() == []
    groups, scalars = state_of(20)
    checkpoints.save(Progress(20, epoch_samples=20, samples=20), groups, scalars, RECORD)
    assert checkpoints.finish(), checkpoints.poll()
    assert_is_of_step(checkpoints.latest(), 20)


def operations(folder: Path) -> list[str]:
    """Of a life in which nothing fails."""
    life = Life(folder / "run", FaultyDisk(folder)).live()
    assert life.acknowledged[-2:] == [10, 11]
    assert not life.failed
    assert life.acknowledged[0] in (1, 2, 3), "it did not go back"
    return life.disk.operations


@pytest.fixture(scope="module")
def count(tmp_path_factory) -> int:
    found = operations(tmp_path_factory.mktemp("whole"))
    kinds = {text.split(" ")[0] for text in found}
    assert kinds == {"mkdir", "create", "write", "sync", "rename", "unlink", "rmdir"}
    assert any("set-aside" in text or "step-00000004" in text for text in found)
    assert len(found) > 100
    return len(found)


def test_the_machine_stops_at_any_operation(tmp_path, count):
    for at in range(count):
        world = tmp_path / str(at)
        world.mkdir()
        life = Life(world / "run", FaultyDisk(world, at)).live()
        assert life.disk.stopped
        for name, left in life.disk.aftermaths(MIXTURES):
            place = world / "left"
            lay_out(left, place)
            try:
                assert_nothing_is_lost(place / "run", life)
            except BaseException as error:
                error.add_note(f"stopped at operation {at}, {life.disk.operations[at]}; {name}; acknowledged {life.acknowledged}")
                raise
            shutil.rmtree(place)
        shutil.rmtree(world)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_an_operation_fails_and_the_run_goes_on(tmp_path, count, lasting):
    for at in range(0, count, 3 if lasting else 1):
        world = tmp_path / str(at)
        world.mkdir()
        what = list(ERRORS)[at // 3 % 3] if lasting else list(ERRORS)[at % 3]
        life = Life(world / "run", FaultyDisk(world, at, what, lasting))
        try:
            life.live()
            assert len(life.failed) <= 1 or lasting
            assert_nothing_is_lost(world / "run", life)
        except BaseException as error:
            error.add_note(f"{what} at operation {at}, {life.disk.operations[at]}; acknowledged {life.acknowledged}")
            raise
        shutil.rmtree(world)
