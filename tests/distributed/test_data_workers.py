"""Whole runs whose data are read by worker processes, in micro-batches of different sizes and epochs of different lengths."""

import os
import signal
from pathlib import Path

import pytest

from tests.distributed.harness import world
from tests.distributed.test_run import assert_same_tensors, export_of, losses_of, steps_of
from tests.utils.data.batches.test_workers import is_running, wait_until
from utils.stopping import FAILED, RUN_AGAIN

SETTINGS = {
    "max_steps": None,
    "epochs": 4,
    "image_micro_batch_size_per_gpu": 3,
    "checkpoint_every_n_steps": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture
def fractions(workspace):
    """Two pictures and six clips, which an epoch shows one and a half times: 3 and 9."""
    settings = workspace.dataset.read_text().replace("num_repeats = 2", "num_repeats = 1.5")
    assert "1.5" in settings
    workspace.dataset.write_text(settings)
    return workspace


def workers_of(rank: int) -> list[int]:
    """Processes that were forked from it."""
    return [int(pid) for task in Path(f"/proc/{rank}/task").iterdir() for pid in (task / "children").read_text().split()]


def test_read_by_workers_on_two_stages_and_stopped_it_is_the_run_of_one_process(fractions, tiny):
    """The signal comes to every process, as Slurm sends it; the workers leave it to the ranks."""
    model = tiny("wan-t2v")
    fractions.train(fractions.config("straight", model, **SETTINGS, num_loader_workers=0), processes=1)
    straight = steps_of(fractions.run("straight"))
    counts = [now["samples"] - before["samples"] for before, now in zip([{"samples": 0}, *straight], straight, strict=False)]
    assert len(set(counts)) > 1, "every step had as many samples"
    assert all(line["samples_per_second"] == pytest.approx(n / line["seconds"]) for n, line in zip(counts, straight, strict=True))
    assert all(0 <= line["data_wait_seconds"] <= line["seconds"] for line in straight)

    changes = {"pipeline_stages": 2, "num_loader_workers": 2, "resume": "latest-or-new"}
    config = fractions.config("stopped", model, **SETTINGS, **changes)
    with world(["train.py", "--config", config], 2, fractions.folder) as running:
        running.wait_until((fractions.run("stopped") / "checkpoints" / "step-00000002").is_dir)
        ranks = [process.pid for process in running.processes]
        workers = [pid for rank in ranks for pid in workers_of(rank)]
        assert len(workers) == 4
        for pid in [*workers, *ranks]:
            os.kill(pid, signal.SIGTERM)
        assert running.wait(120) == [RUN_AGAIN] * 2, running.said()
    wait_until(lambda: not any(map(is_running, workers)))
    assert 2 <= len(steps_of(fractions.run("stopped"))) < len(straight), "the run was over before it was stopped"
    fractions.train(config, processes=2)
    assert losses_of(fractions.run("stopped")) == losses_of(fractions.run("straight"))
    assert [line["samples"] for line in steps_of(fractions.run("stopped"))] == [line["samples"] for line in straight]
    assert_same_tensors(export_of(fractions.run("stopped")), export_of(fractions.run("straight")))


def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(fractions, tiny):
    config = fractions.config("run", tiny("wan-t2v"), **{**SETTINGS, "epochs": 1000}, num_loader_workers=1)
    with world(["train.py", "--config", config], 1, fractions.folder) as running:
        running.wait_until((fractions.run("run") / "metrics.jsonl").is_file)
        [worker] = workers_of(running.processes[0].pid)
        os.kill(worker, signal.SIGKILL)
        assert running.wait(120) == [FAILED]
        said = running.said()
    assert f"data worker 1 of 1 (process {worker}) was killed by SIGKILL. That is what happens when memory runs out" in said
    assert "num_loader_workers" in (fractions.run("run") / "log.txt").read_text()


def test_epochs_without_samples_are_an_error_before_anything_is_done(fractions, tiny):
    settings = fractions.dataset.read_text().replace("num_repeats = 1.5", "num_repeats = 0.1")
    fractions.dataset.write_text(settings)
    config = fractions.config("run", tiny("wan-t2v"), **{**SETTINGS, "epochs": 1})
    said = fractions.train(config, "--check", expect=2)
    assert "epochs = 1: with these num_repeats no epoch before epoch" in said
