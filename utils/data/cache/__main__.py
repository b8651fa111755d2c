"""What a cache of encoded data holds, and what of it can go.

    python -m utils.data.cache ls DIR              what is there: by which encoder, how much, when it was last used
    python -m utils.data.cache verify DIR          whether each file is whole: every byte is read
    python -m utils.data.cache size DIR            how much room it takes
    python -m utils.data.cache prune DIR [--unused-for 30d] [--dry-run]

DIR is ``cache_dir``, by default ``output_dir/cache``.  Runs may use the cache meanwhile.
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import words
from utils.config.schema import seconds_in
from utils.data.cache.shards import ABOUT, INDEX_ERRORS, check_bytes, check_header, index_names, read_index
from utils.errors import UserError

LEFTOVER_SECONDS = 86400.0
"""Younger leftovers may be what a run that is going on writes just now."""
Lines = Iterable[str]


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if something is damaged, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m utils.data.cache", description="Look after a cache of encoded data.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("path", type=Path, metavar="DIR", help="the cache's folder")
    prune = commands.choices["prune"]
    prune.add_argument("--unused-for", type=_time, metavar="TIME", help="remove what no run has used for so long, too: 30d, 12h")
    prune.add_argument("--read-all", action="store_true", help="read every byte to find what is damaged, as verify does")
    prune.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    args = parser.parse_args(arguments)
    try:
        lines, code = COMMANDS[args.command][0](args)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return code


def _time(text: str) -> float:
    try:
        return seconds_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Part:
    """What one encoder with one fingerprint has made."""

    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def indexes(self) -> list[Path]:
        return [self.folder / name for name in index_names(self.folder)]

    def about(self) -> dict[str, Any]:
        """Empty if it is not told."""
        try:
            return json.loads((self.folder / ABOUT).read_bytes())
        except (OSError, ValueError):
            return {}

    def problem(self, index: Path, read_all: bool) -> str | None:
        """What is wrong with a shard."""
        try:
            (check_bytes if read_all else check_header)(index, read_index(index))
        except INDEX_ERRORS as error:
            return str(error)
        return None

    def orphans(self) -> Iterator[Path]:
        """Shards that have no index: their writer was killed just then, or has not come to that yet."""
        return (shard for shard in sorted(self.folder.glob("*.safetensors")) if not shard.with_suffix(".json").exists())

    def leftovers(self) -> list[Path]:
        """Files that were not finished."""
        return sorted(self.folder.glob(".*.tmp"))


def parts_of(path: Path) -> list[Part]:
    """UserError if it is no cache."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name the cache_dir of a run, by default output_dir/cache")
    # By their names: nobody's other files are to be taken for parts of a cache.
    parts = [Part(folder) for folder in sorted(path.glob("*/*")) if re.fullmatch("[0-9a-f]{32}", folder.name) and folder.is_dir()]
    if not parts and not all(file.name.startswith("files.") for file in path.iterdir()):
        raise UserError(f"{path} is not a cache of encoded data; name the cache_dir of a run, by default output_dir/cache")
    return parts


def _bytes_in(folder: Path) -> int:
    return sum(_size(file) for file in folder.rglob("*") if file.is_file())


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a run has renamed it just now
        return 0


def _seconds_since_change(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


# ── the commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ls(args: argparse.Namespace) -> tuple[Lines, int]:
    rows = [("encoder", "items", "files", "size", "last used", "made by", "state")]
    for part in parts_of(args.path):
        problems, items, used = 0, 0, 0.0
        indexes = part.indexes
        for index in indexes:
            if part.problem(index, read_all=False):
                problems += 1
                continue
            items += sum(len(entry["keys"]) for entry in read_index(index)["items"])
            used = max(used, index.stat().st_mtime)
        about = part.about()
        maker = ", ".join(str(about[name]) for name in ("class", "dtype") if name in about)
        state = [f"{problems} damaged"] if problems else []
        state += [f"{number} {what}" for what, number in _unfinished(part).items() if number]
        last = f"{words.age(time.time() - used)} ago" if used else ""
        facts = (str(items), str(len(indexes)), words.size(_bytes_in(part.folder)), last, maker, ", ".join(state) or "whole")
        rows.append((part.name, *facts))
    note = ["", f"whole: by the files' sizes; `verify` reads every byte. What made a part is in its {ABOUT}"]
    return words.table(rows) + note if len(rows) > 1 else ["the cache is empty"], 0


def _unfinished(part: Part) -> dict[str, int]:
    return {"without index": sum(1 for _ in part.orphans()), "unfinished": len(part.leftovers())}


def verify(args: argparse.Namespace) -> tuple[Lines, int]:
    lines, damaged = [], 0
    for part in parts_of(args.path):
        problems = {index: part.problem(index, read_all=True) for index in part.indexes}
        found = [f"{index.with_suffix('.safetensors')}: {problem}" for index, problem in problems.items() if problem]
        damaged += len(found)
        lines.append(f"{part.name}: {len(found)} of {len(problems)} files DAMAGED:" if found else f"{part.name}: whole")
        lines += [f"  {line}" for line in found]
    if damaged:
        lines.append("what they held is encoded again when a run needs it; `prune --read-all` removes them")
    return lines or ["the cache is empty"], 1 if damaged else 0


def size(args: argparse.Namespace) -> tuple[Lines, int]:
    rows = [(part.name, words.size(_bytes_in(part.folder))) for part in parts_of(args.path)]
    whole = _bytes_in(args.path)
    rows.append(("other files", words.size(whole - sum(_bytes_in(part.folder) for part in parts_of(args.path)))))
    rows.append(("all", words.size(whole)))
    rows.append(("free on the disk", words.size(shutil.disk_usage(args.path).free)))
    return words.table(rows), 0


def prune(args: argparse.Namespace) -> tuple[Lines, int]:
    lines, freed = [], 0
    for part in parts_of(args.path):
        for files, reason in _going(part, args, lines):
            freed += sum(map(_size, files))
            if not args.dry_run:
                for file in files:
                    _remove(file)
            name = files[-1].relative_to(args.path)
            lines.append(f"{name} {'would be' if args.dry_run else 'was'} removed: {reason}")
        if not args.dry_run and {file.name for file in part.folder.iterdir()} <= {ABOUT}:
            _remove(part.folder / ABOUT)
            part.folder.rmdir()
    lines.append(f"{'would be ' if args.dry_run else ''}freed: {words.size(freed)}")
    return lines, 0


def _going(part: Part, args: argparse.Namespace, lines: list[str]) -> Iterator[tuple[list[Path], str]]:
    """What goes, in the order in which it is removed: the index first, so that nobody believes in half of it."""
    for index in part.indexes:
        shard, unused = index.with_suffix(".safetensors"), _seconds_since_change(index)
        if problem := part.problem(index, args.read_all):
            yield [index, shard], f"damaged: {problem}"
        elif args.unused_for is not None and unused > args.unused_for:
            yield [index, shard], f"not used for {words.age(unused)}, {words.size(_size(shard))}"
    for file in [*part.leftovers(), *part.orphans()]:
        if _seconds_since_change(file) > LEFTOVER_SECONDS:
            yield [file], f"left by a process that was killed, {words.size(_size(file))}"
        else:
            lines.append(f"{file.relative_to(args.path)} stays: it was changed within the last day, a run may be writing it")


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file} could not be removed: {error}") from error


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], tuple[Lines, int]], str]] = {
    "ls": (ls, "what is there: by which encoder, how much, when it was last used"),
    "verify": (verify, "whether each file is whole; exit code 1 if one is not"),
    "prune": (prune, "remove what killed runs left, what is damaged, and what was not used for long"),
    "size": (size, "how much room it takes"),
}

if __name__ == "__main__":
    sys.exit(main())
