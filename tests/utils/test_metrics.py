"""The files that a run's metrics become, and that no failure of a sink stops it."""

import json
import logging
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb as wandb_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import metrics
from utils.config.schema import WandbConfig
from utils.metrics import MetricLog, setup_logging

OFFLINE = WandbConfig(mode="offline")


def metric_log(
    folder: Path, *, first_step: int = 0, total_steps: int = 8, wandb: WandbConfig | None = None, **changes
) -> MetricLog:
    settings = {"enabled": True, "run_name": "demo", "config": {"lr": 1e-3}} | changes
    return MetricLog(folder, wandb=wandb, total_steps=total_steps, first_step=first_step, **settings)


def step(number: int, **values) -> dict:
    return {"step": number, "loss": 1 / number, "samples_per_second": 2.5, "seconds": 0.5} | values


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(autouse=True)
def _no_file_of_wandb_elsewhere(tmp_path, monkeypatch):
    """No cache, no login and no settings of the person who runs the tests."""
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def root_logger():
    """The root logger, put back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    quiet = {name: logging.getLogger(name).level for name in metrics.NOISY_LOGGERS}
    yield root
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)


class TestJsonLines:
    def test_steps_and_events(self, run_folder):
        log = metric_log(run_folder)
        log.event("eval", {"step": 0, "dataset": "held", "loss": 0.5})
        log.step(step(1, stage_memory_gb=[1.5, 2.0]))
        log.event("export", {"name": "step-00000001"})
        # A line is there as soon as the call is over, whatever becomes of the process.
        assert lines(run_folder) == [
            {"kind": "eval", "step": 0, "dataset": "held", "loss": 0.5},
            {"kind": "step", "step": 1, "loss": 1.0, "samples_per_second": 2.5, "seconds": 0.5, "stage_memory_gb": [1.5, 2.0]},
            {"kind": "export", "step": 1, "name": "step-00000001"},
        ]
        log.close()

    def test_what_is_not_finite_becomes_null(self, run_folder):
        log = metric_log(run_folder)
        log.step(step(1, loss=math.nan, grad_norm=math.inf, parts={"a": [1.0, -math.inf]}))
        log.close()
        (line,) = lines(run_folder)
        assert (line["loss"], line["grad_norm"], line["parts"]) == (None, None, {"a": [1.0, None]})

    def test_tensors(self, run_folder):
        log = metric_log(run_folder)
        log.step(step(1, loss=torch.tensor(0.25), each=torch.tensor([1, 2])))
        log.close()
        assert (lines(run_folder)[0]["loss"], lines(run_folder)[0]["each"]) == (0.25, [1, 2])

    def test_resuming_leaves_one_straight_run(self, run_folder):
        first = metric_log(run_folder)
        first.event("eval", {"step": 0, "loss": 1.0})
        for number in range(1, 7):
            first.step(step(number, lr=1.0))
            if number % 3 == 0:
                first.event("checkpoint", {"step": number})
        first.close()
        with (run_folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "step": 3, "lo')  # what kill -9 leaves
        again = metric_log(run_folder, first_step=3)
        for number in range(4, 9):
            again.step(step(number, lr=2.0))
        again.close()
        found = [(line["kind"], line["step"], line.get("lr")) for line in lines(run_folder)]
        steps = [("step", number, 1.0 if number <= 3 else 2.0) for number in range(1, 9)]
        assert found == [("eval", 0, None), *steps[:3], ("checkpoint", 3, None), *steps[3:]]
        assert not (run_folder / "metrics.jsonl.part").exists()

    def test_a_new_run_begins_with_an_empty_file(self, run_folder):
        for _ in range(2):
            log = metric_log(run_folder)
            log.event("eval", {"step": 0, "loss": 1.0})
            log.close()
        assert len(lines(run_folder)) == 1

    def test_other_ranks_write_nothing(self, run_folder, caplog):
        caplog.set_level(logging.INFO)
        log = metric_log(run_folder, enabled=False, wandb=OFFLINE)
        log.step(step(1))
        log.event("eval", {"loss": 1.0})
        log.close()
        assert list(run_folder.iterdir()) == []
        assert caplog.records == []


class TestTensorBoard:
    def test_scalars(self, run_folder):
        log = metric_log(run_folder)
        log.step(step(1, stage_memory_gb=[1.5, 2.0], lr=0.5, note="text", loss=math.nan))
        log.step(step(2))
        log.event("eval", {"step": 2, "dataset": "held", "loss": 0.25})
        log.event("refused_step", {"step": 2, "samples": ["a", "b"]})
        log.close()
        assert scalars(run_folder) == {
            "train/loss": [(2, 0.5)],
            "train/samples_per_second": [(1, 2.5), (2, 2.5)],
            "train/seconds": [(1, 0.5), (2, 0.5)],
            "train/stage_memory_gb/0": [(1, 1.5)],
            "train/stage_memory_gb/1": [(1, 2.0)],
            "train/lr": [(1, 0.5)],
            "eval/held/loss": [(2, 0.25)],
        }

    def test_resuming_hides_the_later_steps(self, run_folder):
        first = metric_log(run_folder)
        for number in range(1, 6):
            first.step(step(number, loss=1.0))
        first.close()
        again = metric_log(run_folder, first_step=3)
        again.step(step(4, loss=2.0))
        again.close()
        assert scalars(run_folder)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]

    def test_a_failure_costs_only_tensorboard(self, run_folder, caplog):
        (run_folder / "tensorboard").write_text("a file where the folder should be")
        log = metric_log(run_folder)
        log.step(step(1))
        log.step(step(2))
        log.close()
        assert len(lines(run_folder)) == 2
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.startswith("TensorBoard cannot be used and is left out: ")
        assert "File exists" in warning


class TestWandb:
    def test_an_offline_run(self, run_folder):
        secret_place = run_folder.parent / "secret-place"
        config = {"lr": 0.125, "model": {"type": "wan", "path": secret_place}, "also": [str(secret_place), "kept"]}
        log = metric_log(run_folder, wandb=WandbConfig(mode="offline", project="a-project", name="a-name"), config=config)
        log.step(step(1))
        log.event("eval", {"dataset": "held", "loss": 0.25})
        log.close()
        wandb_module.teardown()  # waits for the process that writes the file; else Python's exit does
        (file,) = run_folder.glob("wandb/offline-run-*/run-*.wandb")
        content = file.read_bytes()
        for known in (b"a-project", b"a-name", b"train/loss", b"eval/held/loss", b"0.125", b"wan", b"kept"):
            assert known in content
        for private in (b"secret-place", str(run_folder).encode(), str(Path.cwd()).encode(), b"demo"):
            assert private not in content

    def test_a_resumed_run_is_the_same_run(self, run_folder):
        for first_step in (0, 1):
            log = metric_log(run_folder, wandb=OFFLINE, first_step=first_step)
            log.step(step(first_step + 1))
            log.close()
        files = [file.name for file in run_folder.glob("wandb/offline-run-*/run-*.wandb")]
        assert len(files) == 2
        assert len(set(files)) == 1

    def test_a_blocked_folder_costs_only_wandb(self, run_folder, caplog):
        (run_folder / "wandb").write_text("a file where the folder should be")
        log = metric_log(run_folder, wandb=OFFLINE)
        log.step(step(1))
        log.close()
        assert len(lines(run_folder)) == 1
        assert scalars(run_folder)["train/loss"] == [(1, 1.0)]
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.startswith("Weights & Biases cannot be used and is left out: ")

    def test_a_missing_key_is_not_asked_for(self, run_folder, caplog):
        log = metric_log(run_folder, wandb=WandbConfig(mode="online"))
        log.step(step(1))
        log.close()
        assert len(lines(run_folder)) == 1
        assert "Weights & Biases cannot be used and is left out: No API key configured" in caplog.text

    def test_a_failure_while_training(self, run_folder, caplog):
        """The real client, whose run is ended behind our back."""
        log = metric_log(run_folder, wandb=OFFLINE)
        log.step(step(1))
        wandb_module.finish()
        for number in (2, 3):
            log.step(step(number))
        log.close()
        assert len(lines(run_folder)) == 3
        warnings = [record.getMessage() for record in caplog.records if "Weights & Biases" in record.getMessage()]
        assert len(warnings) == 1
        assert warnings[0].startswith("Weights & Biases failed and is left out from now on: ")


def test_a_full_disk_does_not_stop_training(run_folder, caplog):
    log = metric_log(run_folder)
    with Path("/dev/full").open("a", buffering=1) as full:
        log._sinks[0]._file = full
        log.step(step(1))
        log.step(step(2))
        log.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["metrics.jsonl failed: [Errno 28] No space left on device"]


class TestProgress:
    @pytest.mark.usefixtures("capsys")  # standard error is no terminal then
    def test_lines(self, run_folder, caplog):
        """The first step, the last one, and nothing in between when steps are quick."""
        caplog.set_level(logging.INFO)
        log = metric_log(run_folder, total_steps=4)
        for number in range(1, 5):
            log.step(step(number, loss=math.nan if number == 4 else 0.25))
        log.close()
        first, last = [record.getMessage() for record in caplog.records]
        assert first.startswith("step 1/4  loss 0.2500  2.5 samples/s  0:00:0")
        assert first.endswith(" left")
        assert last == "step 4/4  loss not finite  2.5 samples/s  0:00:00 left"

    @pytest.mark.usefixtures("capsys")
    def test_lines_when_time_has_passed(self, run_folder, caplog, monkeypatch):
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", 0.0)
        log = metric_log(run_folder, total_steps=9, first_step=2)
        for number in (3, 4, 5):
            log.step(step(number))
        log.close()
        assert [record.getMessage().split("  ")[0] for record in caplog.records] == ["step 3/9", "step 4/9", "step 5/9"]

    def test_time_left(self, run_folder, monkeypatch):
        """From the mean since this process began, whatever a single step took."""
        clock = iter([100.0, 130.0])
        monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        progress = metrics._Progress(total_steps=10, first_step=2)
        assert progress.describe(step(3, seconds=10.0)).endswith("0:01:10 left")
        assert progress.describe(step(4, seconds=30.0)).endswith("0:02:00 left")

    def test_the_bar_of_a_terminal_keeps_log_lines_whole(self, run_folder, process_environment):
        script = (
            "import logging, sys, pathlib; from utils.metrics import MetricLog, setup_logging\n"
            "setup_logging(None, 0); folder = pathlib.Path(sys.argv[1])\n"
            "log = MetricLog(folder, enabled=True, wandb=None, run_name='a', config={}, total_steps=2, first_step=0)\n"
            "log.step({'step': 1, 'loss': 0.5}); logging.getLogger('x').info('in between')\n"
            "log.step({'step': 2, 'loss': 0.25}); log.close(); logging.getLogger('x').info('afterwards')\n"
        )
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", script, run_folder],
            stdin=theirs,
            stderr=theirs,
            stdout=subprocess.DEVNULL,
            env=process_environment | {"TERM": "xterm", "COLUMNS": "100"},
            cwd=Path(__file__).parents[2],
        )
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 65536):
                seen += chunk
        except OSError:
            pass  # how Linux says that the other end of a terminal is closed
        os.close(ours)
        assert process.wait() == 0
        text = seen.decode()
        assert "INFO in between\r\n" in text
        assert "INFO afterwards\r\n" in text
        assert "2/2" in text
        assert "loss 0.2500" in text
        assert "\x1b[?25h" in text  # the cursor is shown again


class TestLogging:
    def test_ranks_share_a_file(self, run_folder, root_logger, capsys):
        file = run_folder / "log.txt"
        for rank in (0, 1):
            setup_logging(file, rank)
            logging.getLogger("part").info("about %d", rank)
            logging.getLogger("part").warning("beware %d", rank)
        written = [line.split(" ", 2)[2] for line in file.read_text().splitlines()]
        assert written == ["INFO part: about 0", "WARNING part: beware 0", "[rank 1] WARNING part: beware 1"]
        shown = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
        assert shown == ["INFO about 0", "WARNING beware 0", "[rank 1] WARNING beware 1"]

    def test_a_second_call_replaces_the_first(self, run_folder, root_logger, capsys):
        setup_logging(None, 0)
        setup_logging(run_folder / "log.txt", 0)
        setup_logging(run_folder / "log.txt", 0)
        logging.getLogger("part").info("once")
        assert (run_folder / "log.txt").read_text().count("once") == 1
        assert capsys.readouterr().err.count("once") == 1

    def test_libraries_are_quiet(self, run_folder, root_logger, capsys):
        setup_logging(None, 0)
        for name in metrics.NOISY_LOGGERS:
            logging.getLogger(f"{name}.inner").info("noise")
            logging.getLogger(f"{name}.inner").warning("heard")
        shown = capsys.readouterr().err
        assert "noise" not in shown
        assert shown.count("heard") == len(metrics.NOISY_LOGGERS)
