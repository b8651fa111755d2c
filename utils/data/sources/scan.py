"""The pictures and clips of a data set: what is there, what is wrong with it, and the samples that are made of it."""

import gc
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.dataset import DatasetConfig
from utils.data.media.files import printable
from utils.data.sources.buckets import problems, settings_for
from utils.data.sources.directories import Directory
from utils.data.sources.looks import FileMemory, look_at_all, remembered
from utils.data.sources.repeats import factors
from utils.data.sources.report import MAX_LISTED, DirectoryReport, ScanReport
from utils.data.values import ANY_CONTROLS, ControlRules, Sample, SizeRules
from utils.errors import UserError, listed
from utils.words import count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    samples: list[Sample]
    """In the order of their keys."""
    report: ScanReport

    def __reduce__(self) -> tuple[Any, ...]:
        """Rank 0 sends it to the others: 100 000 samples are read several times faster without the collector."""
        return _received, (pickle.dumps((self.samples, self.report), pickle.HIGHEST_PROTOCOL),)


def _received(data: bytes) -> Scan:
    with _collection(False):
        return Scan(*pickle.loads(data))


def scan(
    dataset: DatasetConfig,
    rules: SizeRules,
    *,
    hash_cache: Path | None,
    controls: ControlRules = ANY_CONTROLS,
    caption_seed: int | None = None,
    stop: Callable[[], str] = lambda: "",
) -> Scan:
    """Look at every file of the data set and make the samples.

    Each file is hashed and probed once and then known again as long as it does not change, by the small file ``hash_cache``.
    ``caption_seed``: the seed that the samples' caption variants and random crops are drawn with; None, for evaluation: the first
    caption alone, and crops that are the same in every run.
    Raises UserError, before any file is read, for settings that the model cannot take; then one with everything that is wrong:
    places that cannot be read and, unless ``on_bad_sample`` is ``skip``, files that cannot be used; then if nothing is left to
    train on.  A file that no bucket takes is a warning.  ``stop`` is asked after each new file; with a reason to stop, what was
    looked at is remembered and Stopped raised.
    """
    if impossible := problems(dataset, rules, controls):
        raise UserError(listed(impossible, "the dataset does not fit the model:"))
    with _collection(False):
        memory = FileMemory(hash_cache)
        parts = _listed(dataset, rules, controls, memory)
        known, new = remembered((wanted for part in parts for wanted in part.wanted()), memory)
        with _collection(bool(new)):  # files that are read leave much behind
            looks = known | look_at_all(new, memory, stop)
        for part in parts:
            part.check(looks)
        _refuse(parts, skip=dataset.on_bad_sample == "skip")
        return _made(parts, dataset, rules, caption_seed)


@contextmanager
def _collection(wanted: bool) -> Iterator[None]:
    """Python's collector looks at all objects again whenever there are so many more.  Samples stay: it would find nothing."""
    before = gc.isenabled()
    gc.enable() if wanted else gc.disable()
    try:
        yield
    finally:
        gc.enable() if before else gc.disable()


def _listed(dataset: DatasetConfig, rules: SizeRules, controls: ControlRules, memory: FileMemory) -> list[Directory]:
    """What lies in the directories."""
    names: list[str] = []
    for index, directory in enumerate(dataset.directory):
        # A second folder of the same name gets its place in the file, so that keys stay unique.
        name = printable(directory.path.resolve().name)
        while name in names:
            name = f"{name}[{index}]"
        names.append(name)
    return [
        Directory.read(name, directory, settings_for(dataset, directory), rules, controls, memory)
        for name, directory in zip(names, dataset.directory, strict=True)
    ]


def _made(parts: list[Directory], dataset: DatasetConfig, rules: SizeRules, caption_seed: int | None) -> Scan:
    """The samples and their report."""
    for part in parts:
        part.plan(rules)
    totals = [part.total for part in parts]
    scales = factors(totals, [part.config.is_reg for part in parts], dataset.sampling_temperature)
    samples: list[Sample] = []
    for part, total, scale in zip(parts, totals, scales, strict=True):
        part.report.shown = total * scale
        samples += part.samples(scale, caption_seed)
        _warn_of_unused(part.report)
    report = ScanReport([part.report for part in parts], _duplicates(parts))
    if not any(part.report.samples for part in parts if not part.config.is_reg):
        what = "the data set is empty: nothing in it can be trained on"
        if samples:
            what = "only the regularisation sets (is_reg) have anything that can be trained on"
        raise UserError(f"{what}. Add captioned files, or frame_buckets that fit them. Found:\n" + "\n".join(report.lines()))
    assert len({sample.key for sample in samples}) == len(samples), "a sample is known by its key"
    return Scan(sorted(samples, key=lambda sample: sample.key), report)


def _refuse(parts: list[Directory], skip: bool) -> None:
    """Raise for what is wrong, or with ``skip`` leave the files out that cannot be used, and name all of them."""
    wrong = [line for part in parts for line in part.problems.whole]
    files = [line for part in parts for line in part.problems.lines()[len(part.problems.whole) :]]
    if wrong or (files and not skip):
        wrong += files
        more = []
        if len(wrong) > MAX_LISTED:
            log.warning(listed(wrong, "everything that is wrong with the data set:"))
            more = [f"and {len(wrong) - MAX_LISTED} more, which the log names"]
        hint = ' (on_bad_sample = "skip" trains without the files that have one)' if files and not skip else ""
        raise UserError(listed(wrong[:MAX_LISTED] + more, f"the data set has {count(len(wrong), 'problem')}{hint}:"))
    if files:
        log.warning(listed(files, f"{count(len(files), 'file')} cannot be used, and the run goes without:"))
    for part in parts:
        part.report.skipped = {printable(name): reason for name, (_, reason) in part.problems.files.items()}


def _warn_of_unused(report: DirectoryReport) -> None:
    if report.unused:
        named = [f"{name}: {reason}" for name, reason in report.unused.items()]
        more = [f"and {len(named) - MAX_LISTED} more"] if len(named) > MAX_LISTED else []
        place = printable(str(report.path))
        log.warning(listed(named[:MAX_LISTED] + more, f"{place}: {count(len(named), 'file')} cannot be used:"))


def _duplicates(parts: list[Directory]) -> list[list[str]]:
    """Different files of the same content; a file of two directories is none."""
    places: dict[str, dict[str, str]] = {}
    for part in parts:
        for item, look in part.looks:
            places.setdefault(look.content, {}).setdefault(item.found.identity, f"{part.name}/{item.name}")
    return sorted(sorted(names.values()) for names in places.values() if len(names) > 1)
