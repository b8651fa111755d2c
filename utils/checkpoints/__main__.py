"""What checkpoints a run has, and which of them can go.

    python -m utils.checkpoints ls RUN             what is there
    python -m utils.checkpoints verify RUN         whether each is whole: every byte is read
    python -m utils.checkpoints show RUN           what the newest holds, and how its settings differ from the run's
    python -m utils.checkpoints prune RUN --keep-last 2 [--dry-run]

RUN is a run's folder; ``verify`` and ``show`` take the folder of one checkpoint, too.
"""

import argparse
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from utils import words
from utils.checkpoints.checkpoint import Checkpoint, differences, kind_of
from utils.checkpoints.manager import CheckpointManager
from utils.checkpoints.retention import Retention
from utils.errors import UserError, listed
from utils.topology import Topology
from utils.weights.tensor_files import SafetensorsFile

# Younger leftovers may be what a run that is going on writes just now.
LEFTOVER_SECONDS = 3600
Lines = Iterable[str]


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if something is damaged, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m utils.checkpoints", description="Look after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("path", type=Path, metavar="RUN", help="the run's folder")
    show = commands.choices["show"]
    show.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    show.add_argument("--against", type=int, metavar="STEP", help="differences to this checkpoint's settings instead of the run's")
    prune = commands.choices["prune"]
    prune.add_argument("--keep-last", type=_at_least_one, metavar="N", help="keep the newest N whole ones (default: all)")
    prune.add_argument("--keep-every-n-steps", type=_at_least_one, metavar="N", help="keep the first of each N steps as well")
    prune.add_argument("--keep-best", type=_at_least_one, default=0, metavar="N", help="keep the N of lowest eval loss as well")
    prune.add_argument("--damaged", action="store_true", help="remove those that are not whole, too")
    prune.add_argument("--set-aside", action="store_true", help="remove those that a resumed run has put aside, too")
    prune.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    args = parser.parse_args(arguments)
    try:
        lines, code = COMMANDS[args.command][0](args)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return code


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def manager_of(path: Path) -> CheckpointManager:
    """For the run's folder, or its folder of checkpoints.  UserError if there are none."""
    run = path.resolve().parent if path.name == "checkpoints" else path
    manager = CheckpointManager(run, Topology(0, 1, 1, torch.device("cpu"), {}, {}, None))
    if not manager.folder.is_dir():
        raise UserError(f"{path} is not the folder of a run: there is no {manager.folder}")
    return manager


def _chosen(path: Path) -> list[Checkpoint]:
    """The checkpoint that the path is, or those of the run."""
    return [Checkpoint(path)] if (path / "manifest.json").is_file() else manager_of(path).all()


# ── the commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def ls(args: argparse.Namespace) -> tuple[Lines, int]:
    manager = manager_of(args.path)
    rows = [("checkpoint", "epoch", "samples", "eval loss", "size", "age", "written by", "state")]
    for checkpoint in [*manager.all(), *map(Checkpoint, manager.set_aside())]:
        problems = checkpoint.problems(quick=True)
        facts = ("",) * 6 if problems else _facts(checkpoint)
        rows.append((checkpoint.folder.name, *facts, problems[0] if problems else "whole"))
    rows += [(folder.name, *("",) * 6, "left by a process that was stopped") for folder in manager.leftovers()]
    note = ["", "whole: by the files' sizes; `verify` reads every byte"] if len(rows) > 1 else []
    return words.table(rows) + note, 0


def _facts(checkpoint: Checkpoint) -> tuple[str, ...]:
    progress, loss, by = checkpoint.progress, checkpoint.eval_loss, checkpoint.manifest["written_by"]
    written = checkpoint.manifest.get("written_at") or (checkpoint.folder / "manifest.json").stat().st_mtime
    return (
        str(progress.epochs_begun),
        str(progress.samples),
        "" if loss is None else f"{loss:.5f}",
        words.size(checkpoint.bytes),
        words.age(time.time() - written),
        f"{by['stages']} stages x {by['replicas']} replicas",
    )


def verify(args: argparse.Namespace) -> tuple[Lines, int]:
    lines, damaged = [], 0
    for checkpoint in _chosen(args.path):
        problems = checkpoint.problems()
        damaged += bool(problems)
        lines.append(listed(problems, f"{checkpoint.folder.name}: DAMAGED:") if problems else f"{checkpoint.folder.name}: whole")
    return lines or ["there are no checkpoints"], 1 if damaged else 0


def show(args: argparse.Namespace) -> tuple[Lines, int]:
    found = _chosen(args.path)
    checkpoint = _of_step(found, args.step) if args.step is not None else max(found, key=lambda one: one.named_step, default=None)
    if checkpoint is None:
        raise UserError(f"{args.path} has no checkpoints")
    if problems := checkpoint.problems(quick=True):
        return [listed(problems, f"{checkpoint.folder.name}: DAMAGED:")], 1
    manifest, progress = checkpoint.manifest, checkpoint.progress
    lines = [
        f"{checkpoint.folder}",
        f"step {progress.step}, epoch {progress.epochs_begun}, {progress.samples} samples, {words.size(checkpoint.bytes)}, "
        f"format {manifest['version']}",
        f"written by: {', '.join(f'{key} {value}' for key, value in manifest['written_by'].items())}",
    ]
    lines += [f"eval loss of {name}: {loss:.5f}" for name, loss in (manifest.get("eval_losses") or {}).items()]
    for kind in checkpoint.kinds():
        files = [SafetensorsFile(checkpoint.folder / file) for file in manifest["files"] if kind_of(file) == kind]
        entries = [info for file in files for info in file.entries.values()]
        numbers = sum(torch.Size(info.shape).numel() for info in entries)
        dtypes = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in entries}))
        lines.append(f"{kind}: {len(entries)} tensors, {numbers:,} numbers, {dtypes} in {len(files)} files")
    settings = checkpoint.record.get("settings", {})
    if args.against is not None:
        other, title = _of_step(manager_of(args.path).all(), args.against), f"that of step {args.against}"
        changed = differences(settings, other.record.get("settings", {}))
    else:
        title, changed = "the run's config.toml", _differences_to_config(checkpoint, settings)
    lines.append(f"settings, against {title}:" + ("" if changed else " no difference"))
    lines += [f"  {key}: here {_value(before)}, there {_value(now)}" for key, before, now in changed]
    return lines, 0


def _of_step(checkpoints: list[Checkpoint], step: int) -> Checkpoint:
    found = {checkpoint.named_step: checkpoint for checkpoint in checkpoints}
    if step not in found:
        raise UserError(f"there is no checkpoint of step {step}; there are those of {', '.join(map(str, found)) or 'none'}")
    return found[step]


def _differences_to_config(checkpoint: Checkpoint, settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    path = checkpoint.folder.parent.parent / "config.toml"
    if not path.is_file():
        return []
    now = tomllib.loads(path.read_text(encoding="utf-8"))
    # A checkpoint holds no paths, and what belongs to the place of the run and not to the training.
    private = {"run_name", "wandb", "eval_datasets", *(key for key, value in now.items() if _is_path(value))}
    now = {key: value for key, value in now.items() if key not in private}
    return [(key, was, value) for key, was, value in differences(settings, now) if not (was is None and _is_path(value))]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or value.startswith("~"))


def prune(args: argparse.Namespace) -> tuple[Lines, int]:
    manager = manager_of(args.path)
    # Every byte is read: what is kept should be worth it.
    states = {checkpoint: checkpoint.problems() for checkpoint in manager.all()}
    whole = [checkpoint for checkpoint, problems in states.items() if not problems]
    retention = Retention(args.keep_last, args.keep_every_n_steps, args.keep_best)
    going = {checkpoint.folder: "not wanted any more" for checkpoint in retention.to_remove(whole)}
    if args.damaged:
        going |= {checkpoint.folder: "damaged" for checkpoint, problems in states.items() if problems}
    if args.set_aside:
        going |= dict.fromkeys(manager.set_aside(), "set aside")
    lines = []
    for folder in manager.leftovers():
        if _seconds_since_change(folder) > LEFTOVER_SECONDS:
            going[folder] = "left by a process that was stopped"
        else:
            lines.append(f"{folder.name} stays: it was changed within the last hour, a run may be writing it")
    freed = 0
    for folder, reason in going.items():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if not args.dry_run:
            try:
                manager.remove(folder)
            except OSError as error:
                raise UserError(f"{folder} could not be removed: {error}") from error
        freed += size
        lines.append(f"{folder.name} {'would be' if args.dry_run else 'was'} removed: {reason}, {words.size(size)}")
    kept = [checkpoint.folder.name for checkpoint in states if checkpoint.folder not in going]
    lines.append(f"{'would be ' if args.dry_run else ''}freed: {words.size(freed)}; kept: {', '.join(kept) or 'nothing'}")
    return lines, 0


def _seconds_since_change(folder: Path) -> float:
    return time.time() - max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])


# ── in words ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _value(value: Any) -> str:
    return "not set" if value is None else repr(value)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], tuple[Lines, int]], str]] = {
    "ls": (ls, "what checkpoints there are"),
    "verify": (verify, "whether each is whole; exit code 1 if one is not"),
    "show": (show, "what a checkpoint holds, and how its settings differ from the run's"),
    "prune": (prune, "remove what is not wanted any more"),
}

if __name__ == "__main__":
    sys.exit(main())
