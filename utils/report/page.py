"""One page with everything that a run would be trained on, as the model sees it: opened offline, without a server or JavaScript."""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment

from utils.data.encoders import ConditionEncoder
from utils.data.progress import ProgressLog
from utils.data.values import Bucket, Sample
from utils.errors import UserError
from utils.report.findings import BucketFindings, Cut, DataFindings
from utils.report.pictures import Decode, Eyes, Shown, decoded_of, evenly
from utils.report.tables import Summary, number, percent, summary
from utils.stopping import Stopped
from utils.words import count

log = logging.getLogger(__name__)

FILE = "index.html"
MARK = b'<meta name="generator" content="flowstage">'
"""Near the start of each page: a file without it is somebody else's."""
THREADS = 2
"""Samples that are read beside each other; each holds a clip's pixels while its pictures are made."""
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Fact:
    text: str
    is_set: bool = False
    """Whether it differs from what is usual."""


@dataclass(frozen=True)
class ShownCaption:
    weight: str
    """How often it is shown, in per cent; empty where it is the only one."""
    text: str
    cut: list[str]
    """What text encoders do not read of it."""


@dataclass(frozen=True)
class Card:
    """A sample on the page."""

    key: str
    name: str
    """Its key without the bucket."""
    shown: Shown
    crop_style: str
    facts: list[Fact]
    captions: list[ShownCaption]


@dataclass(frozen=True)
class Sheet:
    """The contact sheet of a bucket."""

    bucket: Bucket
    anchor: str
    told: str
    """``24 of 310 samples shown``."""
    cards: Iterator[Card]


@dataclass(frozen=True)
class Part:
    """A data set on the page."""

    summary: Summary
    sheets: list[Sheet]


def refuse_folder(folder: Path) -> None:
    """Raises UserError if the page cannot be written there: told before anything takes long."""
    page = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if page.exists():
            with page.open("rb") as file:
                if MARK not in file.read(1000):
                    raise UserError(f"--report {folder}: {FILE} in it is not one of these pages; name another folder")
        with page.with_suffix(".part").open("wb"):
            pass
        page.with_suffix(".part").unlink()
    except OSError as error:
        raise UserError(f"--report {folder}: no page can be written there ({error.strerror}); name another folder") from error


def write_page(
    folder: Path,
    title: str,
    model: str,
    found: Sequence[DataFindings],
    *,
    encoders: Sequence[ConditionEncoder],
    items: int | None,
    decode: Decode | None = None,
    stop: Callable[[], str] = lambda: "",
) -> Path:
    """Write ``index.html`` and return its path.

    ``encoders``: those of the run, of which it is shown what they are given.  ``items``: samples of each bucket that are shown;
    None: all.

    ``decode``: show what is in the cache, too.  ``stop`` is asked after each sample; with a reason to stop Stopped is raised, and
    a page that was there stays.  Raises UserError if it cannot be written.
    """

    def shown_in(part: BucketFindings) -> list[Sample]:
        return [part.samples[place] for place in evenly(len(part.samples), items or len(part.samples))]

    eyes = Eyes(encoders)
    progress = ProgressLog("drawing the report", sum(len(shown_in(part)) for data in found for part in data.buckets))
    drawn = 0

    def sheet(data: DataFindings, part: BucketFindings) -> Sheet:
        samples = shown_in(part)
        return Sheet(part.bucket, f"{_slug(data.name)}-{part.bucket}", _told(part, len(samples)), cards(data, samples))

    def cards(data: DataFindings, samples: list[Sample]) -> Iterator[Card]:
        nonlocal drawn
        for sample, shown in shown_ahead(samples, data, eyes, pool):
            if reason := stop():
                raise Stopped(reason)
            if decode and not shown.problem:
                shown.strips.insert(1, decoded_of(sample, decode))
            yield card_of(sample, shown, data)
            drawn += 1
            progress.report(drawn)

    page, aside = folder / FILE, (folder / FILE).with_suffix(".part")
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text("utf-8"))
    pool = ThreadPoolExecutor(THREADS)
    try:
        parts = [Part(summary(data), [sheet(data, part) for part in data.buckets]) for data in found]
        written = f"{datetime.now().astimezone():%d %B %Y, %H:%M}"
        with aside.open("w", encoding="utf-8", errors="replace") as file:
            for text in template.generate(title=title, model=model, written=written, sets=parts):
                file.write(text)
        aside.replace(page)
    except OSError as error:
        raise UserError(f"--report {folder}: the page cannot be written ({error.strerror}); name another folder") from error
    finally:
        pool.shutdown(cancel_futures=True)
        aside.unlink(missing_ok=True)
    return page


def shown_ahead(
    samples: Sequence[Sample], data: DataFindings, eyes: Eyes, pool: ThreadPoolExecutor
) -> Iterator[tuple[Sample, Shown]]:
    """The samples with their pictures, in order; a few are read ahead."""
    waiting: deque[tuple[Sample, Future[Shown]]] = deque()
    todo = deque(samples)
    while todo or waiting:
        while todo and len(waiting) < 2 * THREADS:
            sample = todo.popleft()
            waiting.append((sample, pool.submit(eyes.look, sample, data.cuts.get(sample.key))))
        sample, future = waiting.popleft()
        yield sample, future.result()


def card_of(sample: Sample, shown: Shown, data: DataFindings) -> Card:
    return Card(
        sample.key,
        sample.key.replace(f"@{sample.bucket}", ""),
        shown,
        _style(shown.crop) if shown.crop else "",
        facts_of(sample, shown.crop),
        captions_shown(sample, data),
    )


def facts_of(sample: Sample, crop: Cut | None) -> list[Fact]:
    facts = []
    if sample.original_size and crop:
        width, height = sample.original_size
        facts.append(Fact(f"{width} x {height}"))
        facts.append(Fact(f"{percent(crop.cropped)} cropped"))
        enlarged = crop.scale > 1
        facts.append(Fact(f"enlarged {crop.scale:.2f} times" if enlarged else f"scaled by {crop.scale:.2f}", enlarged))
    if sample.fps:
        facts.append(Fact(f"{sample.bucket.frames} frames at {sample.fps:g} fps from {sample.first_frame / sample.fps:.2f} s on"))
    often = "once" if sample.repeats == 1 else f"{number(sample.repeats)} times"
    facts.append(Fact(f"{often} an epoch", sample.repeats != 1))
    facts.append(Fact(f"loss weight {sample.loss_weight:g}", sample.loss_weight != 1))
    return facts


def captions_shown(sample: Sample, data: DataFindings) -> list[ShownCaption]:
    """Every text that is shown with the sample, the most frequent first, and how often."""
    weights = {caption.text: caption.weight for caption in sample.captions} or {sample.caption: 1.0}
    total, kept = sum(weights.values()), 1 - sample.caption_dropout
    shares = {text: kept * weight / total for text, weight in weights.items()}
    if sample.caption_dropout:
        shares[""] = shares.get("", 0.0) + sample.caption_dropout
    shown = []
    for text, share in sorted(shares.items(), key=lambda entry: -entry[1]):
        lengths = [(part.encoders, part.lengths.get((text, len(sample.controls)))) for part in data.captions]
        cut = [
            f"{', '.join(encoders)}: the last {length.tokens - length.limit} of {length.tokens} tokens are cut off"
            for encoders, length in lengths
            if length and length.is_cut
        ]
        shown.append(ShownCaption(percent(share) if len(shares) > 1 else "", text, cut))
    return shown


def _told(part: BucketFindings, shown: int) -> str:
    many = len(part.samples)
    words = [f"{part.tokens} tokens"]
    if part.epoch:
        words.append(f"{count(part.batches, 'batch', 'batches')} of {part.batch_size} in an epoch")
    return ", ".join([*words, f"{shown} of {many} sample{'' if many == 1 else 's'} shown"])


def _style(crop: Cut) -> str:
    left, top, right, bottom = crop.box
    sides = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    return "; ".join(f"{name}: {100 * value:.2f}%" for name, value in sides.items())


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)
