"""What a run says while it trains: metrics.jsonl, TensorBoard, Weights & Biases, one line of progress, and the log."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from utils.config.schema import WandbConfig

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""How often the progress is logged where the console is no terminal."""
NOISY_LOGGERS = ("DeepSpeed", "transformers", "diffusers", "accelerate", "PIL", "urllib3", "httpx")
"""Libraries that report on INFO what is of no use to the person who trains."""

Values = Mapping[str, Any]


class MetricLog:
    """All metrics of a run behind one call.  With ``enabled`` False (every rank but the first) the calls do nothing.

    ``first_step`` is the number of steps that are done already: 0 for a new run, the checkpoint's for one that continues.  Lines of
    later steps, written before the run was stopped, are dropped, so that metrics.jsonl reads as one straight run.  When TensorBoard
    or W&B fails, that is logged once and it is left out from then on; it never stops training.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        enabled: bool,
        wandb: WandbConfig | None,
        run_name: str,
        config: Values,
        total_steps: int,
        first_step: int,
    ):
        self._step = first_step
        self._sinks: list[_Sink] = []
        self._failed: set[str] = set()
        self._progress: _Progress | None = None
        if not enabled:
            return
        self._sinks.append(_JsonLines(run_folder / "metrics.jsonl", first_step))
        self._open("TensorBoard", lambda: _TensorBoard(run_folder / "tensorboard", first_step))
        if wandb is not None:
            self._open("Weights & Biases", lambda: _Wandb(run_folder, wandb, run_name, config, resumed=first_step > 0))
        self._progress = (_Bar if sys.stderr.isatty() else _Lines)(total_steps, first_step)

    def step(self, values: Values) -> None:
        """One optimizer step: ``step`` (counted from 1), ``loss`` and any other numbers, or lists with one for each rank."""
        self._step = values["step"]
        values = self._write("step", values)
        if self._progress is not None:
            self._progress.update(values)

    def event(self, kind: str, values: Values) -> None:
        """Anything else that happened (``eval``, ``checkpoint``, ``export``, …), at the current step if ``values`` names none."""
        self._write(kind, values)

    def close(self) -> None:
        """Finish files and progress; a second call does nothing."""
        if self._progress is not None:
            self._progress.close()
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)
        self._sinks, self._progress = [], None

    def _open(self, name: str, make: Callable[[], "_Sink"]) -> None:
        try:
            self._sinks.append(make())
        except Exception as error:  # whatever their libraries raise: metrics are not worth a run
            log.warning("%s cannot be used and is left out: %s", name, error)

    def _write(self, kind: str, values: Values) -> Values:
        values = {"kind": kind, "step": self._step} | {name: _plain(value) for name, value in values.items()}
        for sink in list(self._sinks):
            self._guarded(sink, lambda sink=sink: sink.write(values))
        return values

    def _guarded(self, sink: "_Sink", call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # as above; a full disk is met here too
            if sink.name not in self._failed:
                log.warning("%s failed%s: %s", sink.name, " and is left out from now on" if sink.optional else "", error)
            self._failed.add(sink.name)
            if sink.optional:
                self._sinks.remove(sink)


class _Sink(Protocol):
    name: str
    optional: bool
    """Left out after a failure; else it is tried again with the next values."""

    def write(self, values: Values) -> None:
        """Take the plain values of one step or event; ``kind`` and ``step`` are always among them."""

    def close(self) -> None: ...


class _JsonLines:
    name = "metrics.jsonl"
    optional = False

    def __init__(self, path: Path, first_step: int):
        if path.exists():
            _drop_later_lines(path, first_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is in the file when `write` returns

    def write(self, values: Values) -> None:
        self._file.write(json.dumps(values, allow_nan=False, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    name = "TensorBoard"
    optional = True

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Events of later steps, written before the run was stopped, are hidden by `purge_step`.
        self._writer = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None, flush_secs=30)

    def write(self, values: Values) -> None:
        for name, value in _scalars(values).items():
            self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    name = "Weights & Biases"
    optional = True

    def __init__(self, run_folder: Path, config: WandbConfig, run_name: str, run_config: Values, *, resumed: bool):
        import wandb  # takes a second, so only where it is asked for

        # Said before `init`, so that a missing API key is a failure and not a question at the terminal that training waits for.
        wandb.setup(settings=wandb.Settings(silent=True))
        # Numbers and settings only: no code, no command line, no names of machines or folders.
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run_name,
            mode=config.mode,
            dir=run_folder,
            id=_wandb_id(run_folder) if resumed else None,
            resume="allow",
            config=_without_paths(run_config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        if self._run.url:
            log.info("Weights & Biases: %s", self._run.url)

    def write(self, values: Values) -> None:
        if scalars := _scalars(values):
            self._run.log(scalars | {"step": values["step"]})

    def close(self) -> None:
        self._run.finish()


class _Progress:
    """What the console says of a step."""

    def __init__(self, total_steps: int, first_step: int):
        self.total_steps, self.first_step = total_steps, first_step
        self._began: float | None = None

    def describe(self, values: Values) -> str:
        """``loss 0.1234  1.5 samples/s  0:12:10 left``."""
        loss, speed, now = values.get("loss"), values.get("samples_per_second"), time.monotonic()
        if self._began is None:
            self._began = now - (values.get("seconds") or 0.0)
        # The mean since this process began to train, so that evaluations and checkpoints count.
        seconds = (now - self._began) / max(1, values["step"] - self.first_step)
        left = timedelta(seconds=round(seconds * (self.total_steps - values["step"])))
        parts = [
            "loss not finite" if loss is None else f"loss {loss:.4f}",
            f"{speed:.3g} samples/s" if speed else "",
            f"{left} left",
        ]
        return "  ".join(filter(None, parts))

    def update(self, values: Values) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leave the console as it was."""


class _Lines(_Progress):
    """Lines in the log: the first step, about one every ten seconds, and the last step."""

    _last_line = -math.inf

    def update(self, values: Values) -> None:
        text, now = self.describe(values), time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or values["step"] == self.total_steps:
            self._last_line = now
            log.info("step %d/%d  %s", values["step"], self.total_steps, text)


class _Bar(_Progress):
    """One line that is redrawn, on a terminal."""

    def __init__(self, total_steps: int, first_step: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__(total_steps, first_step)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, text="")
        self._bar.start()

    def update(self, values: Values) -> None:
        self._bar.update(self._task, completed=values["step"], text=self.describe(values))

    def close(self) -> None:
        self._bar.stop()


class _Console(logging.Handler):
    """Standard error as it is at the moment: a progress bar puts a stream of its own there, which writes above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def setup_logging(log_file: Path | None, rank: int) -> None:
    """Send the log to the console and, once the run's folder is known, to its ``log.txt``.

    Rank 0 reports from INFO up.  Other ranks report warnings and errors only, with their rank, into the same file.  A second call
    replaces what the first one set.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == __name__]:
        root.removeHandler(handler)
        handler.close()
    sender = "" if rank == 0 else f"[rank {rank}] "
    formats: list[tuple[logging.Handler, str]] = [(_Console(), f"%(asctime)s {sender}%(levelname)s %(message)s")]
    if log_file is not None:
        appended = logging.FileHandler(log_file, mode="a", encoding="utf-8")
        formats.append((appended, f"%(asctime)s {sender}%(levelname)s %(name)s: %(message)s"))
    for handler, text in formats:
        handler.setFormatter(logging.Formatter(text, None if isinstance(handler, logging.FileHandler) else "%H:%M:%S"))
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        handler.set_name(__name__)
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in NOISY_LOGGERS:
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING)
        # Some of them write to the console themselves; their warnings belong in log.txt too.
        library.handlers.clear()
        library.propagate = True


def _plain(value: Any) -> Any:
    """Numbers of tensors and arrays as Python's; what is not finite as None, which JSON can say."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _scalars(values: Values) -> dict[str, float]:
    """Numbers by the name of their curve: ``train/loss``, ``train/stage_memory_gb/0``, ``eval/<dataset>/loss``."""
    prefix = "train" if values["kind"] == "step" else "/".join(filter(None, (values["kind"], values.get("dataset"))))
    found = {}
    for name, value in values.items():
        numbered = {f"/{index}": item for index, item in enumerate(value)} if isinstance(value, list) else {"": value}
        for suffix, item in numbered.items():
            if isinstance(item, int | float) and not isinstance(item, bool) and name != "step":
                found[f"{prefix}/{name}{suffix}"] = item
    return found


def _drop_later_lines(path: Path, step: int) -> None:
    """Keep the lines up to a step, all whole; none for a run that starts anew.  A killed run may have left half a line."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def _wandb_id(run_folder: Path) -> str | None:
    """The id of the newest W&B run in the folder, by which its file is named (``wandb/offline-run-…/run-<id>.wandb``)."""
    files = sorted(run_folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    return files[-1].stem.removeprefix("run-") if files else None


def _without_paths(value: Any) -> Any:
    """A config without what is a path, or looks like one: it may name people and machines."""
    if isinstance(value, Mapping):
        kept = {name: _without_paths(inner) for name, inner in value.items() if not _is_path(inner)}
        return {name: inner for name, inner in kept.items() if inner is not None}
    return [_without_paths(inner) for inner in value if not _is_path(inner)] if isinstance(value, list | tuple) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and (os.sep in value or value.startswith("~")))
