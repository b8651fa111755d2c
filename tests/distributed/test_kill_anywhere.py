"""A run that is killed again and again, anywhere, ends with the weights of one that was not."""

import logging
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.harness import World, preloaded, world
from tests.distributed.test_run import assert_same_tensors, export_of, losses_of

log = logging.getLogger(__name__)

# A rank far above the tiny model's widths: a step is short, and a checkpoint of 20 MB is often caught while it is written.
SETTINGS = {
    "pipeline_stages": 2,
    "adapter": {"rank": 648, "alpha": 48, "dropout": 0.1},
    "max_steps": 6,
    "checkpoint_every_n_steps": 1,
}


@dataclass(frozen=True)
class Kill:
    place: str
    """What the run was at: starting, encoding, training, writing (a checkpoint, beside training)."""
    rank: str
    checkpoints: list[int]
    """Steps of those that were there."""


class Killer:
    """Starts one run until it is finished, and kills it on the way."""

    def __init__(self, workspace, config: Path, chance: random.Random, usual_seconds: float, first_while_encoding: bool):
        self.workspace, self.config, self.chance, self.usual_seconds = workspace, config, chance, usual_seconds
        self.folder, self.first_while_encoding = workspace.run(config.stem), first_while_encoding
        self.kills: list[Kill] = []

    def checkpoints(self) -> list[int]:
        return sorted(int(folder.name.removeprefix("step-")) for folder in self.folder.glob("checkpoints/step-*"))

    def is_writing(self) -> bool:
        return any(self.folder.glob("checkpoints/.partial-*"))

    def place(self, running: World) -> str:
        said = running.outputs[0].read_text()
        if self.is_writing():
            return "writing"
        if "encoded data" in said:
            return "training"
        return "encoding" if "to encode" in said else "starting"

    def to_the_end(self) -> None:
        """Start it again after each kill, until it has come to its end."""
        while not self.once():
            pass

    def once(self) -> bool:
        """One start, and perhaps a kill; whether the run is finished."""
        before, began = self.checkpoints(), time.monotonic()
        with world(["train.py", "--config", self.config], 2, self.workspace.folder) as running:
            how = self.chance.choice(["any moment", "any moment", "while writing"])
            if self.first_while_encoding and not self.kills:
                how = "while encoding"
            if how == "any moment":
                self._wait(running, self.chance.uniform(0, self.usual_seconds))
            elif how == "while encoding":
                self._wait_for(running, lambda: self.place(running) != "starting")
                self._wait(running, self.chance.uniform(0, 0.15 * self.usual_seconds))
            else:
                count = self.chance.randint(1, 4)
                for _ in range(count):
                    running_on = self._wait_for(running, self.is_writing) and self._wait_for(running, lambda: not self.is_writing())
                    if not running_on:
                        break
                self._wait_for(running, self.is_writing)
                self._wait(running, self.chance.uniform(0, 0.05))
            if running.is_over():
                assert running.wait(30) == [0, 0], running.said()
                self._continued_from_the_newest(running, before)
                # Where the straight run was slow, as on a machine that does other things too, most moments would be too late.
                self.usual_seconds = min(self.usual_seconds, time.monotonic() - began)
                return True
            victims = self.chance.choice([[0], [1], [0, 1]])
            self.kills.append(Kill(self.place(running), " and ".join(map(str, victims)), self.checkpoints()))
            for rank in victims:
                running.processes[rank].send_signal(9)
            if "stage(s) x" in running.said():
                # They have met: whoever is left must notice by itself.
                running.wait_until_over(30)
            running.kill()  # before that, it is the launcher that knows
            self._continued_from_the_newest(running, before)
        return False

    def _continued_from_the_newest(self, running: World, before: list[int]) -> None:
        """What was there at the start was used: no kill before it took a checkpoint away."""
        if found := re.search(r"continuing from step (\d+)", running.said()):
            assert before, running.said()
            assert int(found[1]) == before[-1], running.said()

    def _wait(self, running: World, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._wait_for(running, lambda: time.monotonic() >= end)

    def _wait_for(self, running: World, condition) -> bool:
        while not condition():
            if running.is_over():
                return False
            time.sleep(0.001)
        return True


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_weights_are_those_of_a_run_that_was_not_killed(workspace, tiny, kills):
    """Kills of one rank or both while starting, encoding, training and writing; a new cache for every run."""
    model = tiny("wan-i2v")
    preloaded()
    began = time.monotonic()
    cache = workspace.folder / "cache-straight"
    workspace.train(workspace.config("straight", model, **SETTINGS, cache_dir=str(cache)), processes=2)
    usual_seconds = time.monotonic() - began
    straight = workspace.run("straight")
    size = sum(file.stat().st_size for file in (straight / "checkpoints" / "step-00000006").iterdir())
    assert size > 18e6, f"{size} bytes are written too fast to be caught"

    seed = time.time_ns()
    chance = random.Random(seed)
    done: list[Kill] = []
    number = 0
    while len(done) < kills:
        number += 1
        cache = workspace.folder / f"cache-{number}"
        config = workspace.config(f"killed-{number}", model, **SETTINGS, cache_dir=str(cache), resume="latest-or-new")
        killer = Killer(workspace, config, chance, usual_seconds, first_while_encoding=number % 2 == 1)
        killer.to_the_end()
        run = workspace.run(f"killed-{number}")
        history = "\n".join([f"seed {seed}, {len(done) + len(killer.kills)} kills, of this run:", *map(str, killer.kills)])
        assert losses_of(run) == losses_of(straight), history
        assert_same_tensors(export_of(run), export_of(straight))
        done += killer.kills
        usual_seconds = killer.usual_seconds
        for used in (run, cache):
            shutil.rmtree(used)
    log.info("%d kills in %d runs:\n%s", len(done), number, "\n".join(map(str, done)))
    assert {"encoding", "writing"} <= {kill.place for kill in done}
    assert {kill.rank for kill in done} == {"0", "1", "0 and 1"}
