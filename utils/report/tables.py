"""Findings as tables and lists, the same for the console and the page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import PurePath
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from utils.data.masks import has_mask
from utils.data.sources.report import FOLDERS, HIDDEN, DirectoryReport
from utils.report.findings import CaptionFindings, DataFindings, item_of

NAMED = 10
"""Files of a list on the console that are named; the page has them all.  What is not used is named in full in both."""


@dataclass(frozen=True)
class Table:
    """Rows of texts under headings; numbers are those of all columns but the first."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()
    """A last row, if there is more than one to add up."""


@dataclass(frozen=True)
class NamedList:
    """Files, or groups of them, and what there is to say of each."""

    title: str
    entries: Sequence[tuple[str, str]]
    lost: bool = False
    """They are not trained on: all of them are named on the console too."""


@dataclass(frozen=True)
class Summary:
    """Everything that is said of a data set in words and numbers."""

    title: str
    tables: list[Table] = field(default_factory=list)
    lists: list[NamedList] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def summary(data: DataFindings) -> Summary:
    lists = [skipped(data), unused(data), duplicates(data), *(cut(data, part) for part in data.captions), enlarged(data)]
    lists += [left_over(data), stray(data), not_looked_at(data)]
    return Summary(
        f"{data.name} data",
        [directories(data), buckets(data), *([captions(data)] if data.captions else [])],
        [part for part in lists if part.entries],
        data.notes,
    )


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def directories(data: DataFindings) -> Table:
    """Without columns of what no directory has."""
    columns = ["directory", "pictures", "clips", "samples", "an epoch", "with mask", "with control", "no caption"]
    columns += ["cropped mean", "most", "enlarged", "skipped", "not used"]
    parts = data.scan.report.directories
    names = [f"{part.name} (regularisation)" if part.is_reg else part.name for part in parts]
    rows = [[name, *_counts(data, [part])] for name, part in zip(names, parts, strict=True)] + [["all", *_counts(data, parts)]]
    told = [place for place, name in enumerate(columns) if name not in IF_ANY or rows[-1][place] != "0"]
    rows = [[row[place] for place in told] for row in rows]
    return Table("directories", [columns[place] for place in told], rows[:-1], rows[-1] if len(parts) > 1 else ())


IF_ANY = ("with mask", "with control", "no caption", "enlarged", "skipped")


def _counts(data: DataFindings, parts: Sequence[DirectoryReport]) -> list[str]:
    samples = [sample for part in parts for sample in data.samples_of(part)]
    cropped = [data.cuts[sample.key].cropped for sample in samples if sample.key in data.cuts]
    scales = [data.cuts[sample.key].scale for sample in samples if sample.key in data.cuts]
    return [
        str(sum(part.pictures for part in parts)),
        str(sum(part.clips for part in parts)),
        str(len(samples)),
        number(sum(sample.repeats for sample in samples)),
        str(sum(map(has_mask, samples))),
        str(sum(bool(sample.controls) for sample in samples)),
        str(sum(part.uncaptioned for part in parts)),
        percent(sum(cropped) / len(cropped)) if cropped else "",
        percent(max(cropped)) if cropped else "",
        str(sum(scale > 1 for scale in scales)),
        str(sum(len(part.skipped) for part in parts)),
        str(sum(len(part.unused) for part in parts)),
    ]


def buckets(data: DataFindings) -> Table:
    """With how many samples an epoch has and in which batches, for data that are trained on."""
    trained = any(part.epoch for part in data.buckets)
    columns = ["bucket", "tokens", "samples", *(["an epoch", "batch size", "batches", "shown again"] if trained else [])]
    rows = []
    for part in data.buckets:
        epoch = [str(part.shown), str(part.batch_size), str(part.batches), str(part.again)] if trained else []
        rows.append([str(part.bucket), str(part.tokens), str(len(part.samples)), *epoch])
    total = ["all", "", str(len(data.samples))]
    if trained:
        shown, batches, again = (
            sum(values) for values in zip(*[(part.shown, part.batches, part.again) for part in data.buckets], strict=True)
        )
        total += [str(shown), "", str(batches), str(again)]
    return Table("buckets (width x height x frames)", columns, rows, total if len(rows) > 1 else ())


def captions(data: DataFindings) -> Table:
    columns = ["text encoder", "captions", "tokens from", "median", "to", "limit", "cut off"]
    rows = []
    for part in data.captions:
        low, median, high = part.spread
        counts = [str(len(part.lengths)), str(low), number(median), str(high), str(part.limit), str(part.num_cut)]
        rows.append([", ".join(part.encoders), *counts])
    return Table("length of the different captions in tokens, with those of the encoder's template and ends", columns, rows)


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def skipped(data: DataFindings) -> NamedList:
    return NamedList("skipped, as they cannot be used", _named(data, "skipped"), lost=True)


def unused(data: DataFindings) -> NamedList:
    return NamedList("not used", _named(data, "unused"), lost=True)


def _named(data: DataFindings, field: Literal["skipped", "unused"]) -> list[tuple[str, str]]:
    return [
        (f"{part.name}/{name}", data.without_paths(reason, part))
        for part in data.scan.report.directories
        for name, reason in getattr(part, field).items()
    ]


def left_over(data: DataFindings) -> NamedList:
    entries = [
        (f"{part.name}/{name}", f"{many} frames at its end")
        for part in data.scan.report.directories
        for name, many in part.left_over.items()
    ]
    return NamedList("clips with frames that make no whole piece", entries)


def stray(data: DataFindings) -> NamedList:
    entries = [
        (f"{PurePath(folder).name}/{name}", f"for none of {part.name}")
        for part in data.scan.report.directories
        for folder, names in part.stray.items()
        for name in names
    ]
    return NamedList("masks, control pictures and given frames that belong to no item", entries)


def not_looked_at(data: DataFindings) -> NamedList:
    kinds = {FOLDERS: "sub-folders", HIDDEN: "hidden files", "": "files without a suffix"}
    entries = [
        (part.name, f"{many} {kinds.get(suffix, suffix)}")
        for part in data.scan.report.directories
        for suffix, many in sorted(part.ignored.items())
    ]
    return NamedList("not looked at", entries)


def duplicates(data: DataFindings) -> NamedList:
    entries = [(first, f"the same file as {', '.join(others)}") for first, *others in data.scan.report.duplicates]
    return NamedList("duplicates, which are trained on as often as they are there", entries)


def enlarged(data: DataFindings) -> NamedList:
    entries = [(f"{item_of(sample)} in {sample.bucket}", f"{scale:.2f} times") for sample, scale in data.enlarged]
    return NamedList("enlarged (no_upscale = true avoids it)", entries)


def cut(data: DataFindings, part: CaptionFindings) -> NamedList:
    """Items with a caption that the encoder does not read to its end, the worst first."""
    worst = {}
    for sample in data.samples:
        length = part.longest_of(sample)
        if length.is_cut:
            worst[item_of(sample)] = length
    ordered = sorted(worst.items(), key=lambda entry: (-entry[1].tokens, entry[0]))
    entries = [(name, f"{length.tokens - length.limit} of {length.tokens} tokens are cut off") for name, length in ordered]
    return NamedList(f"captions that {', '.join(part.encoders)} {'read' if len(part.encoders) > 1 else 'reads'} in part", entries)


# ── on the console ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(told: Summary, console: Console) -> None:
    """In colour and fitted to the width, on a terminal."""
    console.print(Text(told.title, style="bold underline"))
    for table in told.tables:
        console.print(Text(table.title, style="italic" if console.is_terminal else ""))
        console.print(_rich(table, console.is_terminal))
    for note in told.notes:
        console.print(Text(note))
    for part in told.lists:
        style = "bold red" if part.lost else "bold"
        console.print(Text(f"{part.title}: {len(part.entries)}", style=style if console.is_terminal else ""))
        for name, said in shortened(part):
            console.print(Text(f"  {name}: {said}" if said else f"  {name}"))


def shortened(part: NamedList) -> Iterable[tuple[str, str]]:
    if part.lost or len(part.entries) <= NAMED:
        return part.entries
    return [*part.entries[:NAMED], (f"and {len(part.entries) - NAMED} more", "")]


def plain(told: Summary) -> str:
    """The same as text, for a pipe or the log."""
    console = Console(file=StringIO(), width=1 << 16, color_system=None, force_terminal=False)
    show(told, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _rich(table: Table, terminal: bool) -> RichTable:
    made = RichTable(box=box.SIMPLE_HEAD if terminal else box.ASCII2, show_footer=bool(table.total))
    footers = table.total or [""] * len(table.columns)
    for place, (name, footer) in enumerate(zip(table.columns, footers, strict=True)):
        made.add_column(Text(name), Text(footer), justify="right" if place else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def number(value: float) -> str:
    """``12``, ``12.5``: as short as it can be with two decimals."""
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.01 else f"{100 * share:.1f} %"
