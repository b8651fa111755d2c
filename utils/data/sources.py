"""The pictures and clips of a data set: what is there, what is wrong with it, and the samples that are made of it."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from PIL import ImageColor

from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.buckets import Chooser, buckets_for, problems, settings_for
from utils.data.captions import read_captions
from utils.data.clip_parts import first_frames, left_over
from utils.data.conditions import add_conditions, check_conditions
from utils.data.files import MediaError, printable
from utils.data.framing import cropped_share, enlargement
from utils.data.listing import Found, Item, Listing, Problems
from utils.data.looks import FileMemory, Look, Wanted, look_at_all
from utils.data.media import MediaInfo, frames_at
from utils.data.places import list_directory
from utils.data.repeats import as_fraction, factors
from utils.data.scan_report import MAX_LISTED, DirectoryReport, ScanReport, count
from utils.data.values import ANY_CONTROLS, CENTRE, Bucket, Caption, Control, ControlRules, Framing, Reading, Sample, SizeRules
from utils.data.variants import first_caption, may_vary, variants
from utils.draw import seed_from
from utils.errors import UserError, listed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    samples: list[Sample]
    """In the order of their keys."""
    report: ScanReport


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
    with _no_collection():
        return _scan(dataset, rules, hash_cache, controls, caption_seed, stop)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector looks at all objects again whenever there are so many more.  These ones stay: it would find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _scan(
    dataset: DatasetConfig,
    rules: SizeRules,
    hash_cache: Path | None,
    controls: ControlRules,
    caption_seed: int | None,
    stop: Callable[[], str],
) -> Scan:
    names: list[str] = []
    for index, directory in enumerate(dataset.directory):
        # A second folder of the same name gets its place in the file, so that keys stay unique.
        name = printable(directory.path.resolve().name)
        while name in names:
            name = f"{name}[{index}]"
        names.append(name)
    parts = [
        _Part.read(name, directory, settings_for(dataset, directory), rules, controls)
        for name, directory in zip(names, dataset.directory, strict=True)
    ]
    looks = look_at_all((wanted for part in parts for wanted in part.wanted()), FileMemory(hash_cache), stop)
    for part in parts:
        part.check(looks)
    _refuse(parts, skip=dataset.on_bad_sample == "skip")
    for part in parts:
        part.plan(rules)
    totals = [part.total for part in parts]
    scales = factors(totals, [part.directory.is_reg for part in parts], dataset.sampling_temperature)
    samples: list[Sample] = []
    for part, total, scale in zip(parts, totals, scales, strict=True):
        part.report.shown = total * scale
        samples += part.samples(scale, caption_seed)
        _warn_of_unused(part.report)
    report = ScanReport([part.report for part in parts], _duplicates(parts))
    if not any(part.report.samples for part in parts if not part.directory.is_reg):
        what = "the data set is empty: nothing in it can be trained on"
        if samples:
            what = "only the regularisation sets (is_reg) have anything that can be trained on"
        raise UserError(f"{what}. Add captioned files, or frame_buckets that fit them. Found:\n" + "\n".join(report.lines()))
    return Scan(sorted(samples, key=lambda sample: sample.key), report)


def _refuse(parts: "list[_Part]", skip: bool) -> None:
    """Raise for what is wrong, or with ``skip`` leave the files out that cannot be used, and name all of them."""
    wrong = [line for part in parts for line in part.problems.whole]
    files = [line for part in parts for line in part.problems.lines()[len(part.problems.whole) :]]
    if wrong or (files and not skip):
        wrong += files
        more = [f"and {len(wrong) - MAX_LISTED} more"] if len(wrong) > MAX_LISTED else []
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


def _duplicates(parts: "list[_Part]") -> list[list[str]]:
    """Different files of the same content; a file of two directories is none."""
    places: dict[str, dict[str, str]] = {}
    for part in parts:
        for item, look in part.looks:
            places.setdefault(look.content, {}).setdefault(item.found.identity, f"{part.name}/{item.name}")
    return sorted(sorted(names.values()) for names in places.values() if len(names) > 1)


# ── one directory ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Planned:
    """A sample that is not made yet."""

    item: Item
    look: Look
    bucket: Bucket
    first_frame: int
    part: int
    """Which part of its clip it is, from 0."""
    repeats: Fraction


@dataclass
class _Part:
    """One ``[[directory]]`` on the way from its files to its samples."""

    name: str
    directory: DirectoryConfig
    settings: DatasetConfig
    listing: Listing
    captions: dict[str, tuple[Caption, ...]]
    reading: Reading
    fps: float | None
    problems: Problems
    report: DirectoryReport
    looks: list[tuple[Item, Look]] = field(default_factory=list)
    """Items that can be used."""
    conditions: dict[str, Look] = field(default_factory=dict)
    """What belongs to them, by ``Wanted.key``."""
    planned: list[_Planned] = field(default_factory=list)

    @classmethod
    def read(
        cls, name: str, directory: DirectoryConfig, settings: DatasetConfig, rules: SizeRules, controls: ControlRules
    ) -> "_Part":
        """What lies there, with captions, masks and the like, all of it unopened."""
        found = Problems()
        listing = list_directory(directory, settings, found)
        captions = read_captions(listing, settings, found)
        stray = add_conditions(directory, listing, rules, controls, found)
        reading = Reading(ImageColor.getcolor(settings.background, "RGB"), settings.animated)
        report = DirectoryReport(
            name,
            directory.path,
            listing.kind,
            num_repeats=settings.num_repeats,
            is_reg=directory.is_reg,
            loss_weight=directory.loss_weight,
            lists=[*map(printable, listing.lists)],
            controls=len(directory.control_paths),
            unused={printable(name): reason for name, reason in listing.unused.items()},
            stray=stray,
            ignored=+listing.ignored,
        )
        fps = settings.fps or rules.fps
        return cls(name, directory, settings, listing, captions, reading, fps, found, report)

    def wanted(self) -> Iterator[Wanted]:
        """Every file that has to be looked at."""
        for item in self.listing.items:
            yield self._item(item)
            for found in (item.mask, *item.controls, *item.known_frames.values()):
                if found:
                    yield self._beside(found)

    def _item(self, item: Item) -> Wanted:
        return Wanted(item.found, self.reading, self.directory.alpha_mask and item.mask is None)

    def _beside(self, found: Found) -> Wanted:
        return Wanted(found, self.reading)

    def check(self, looks: dict[str, Look | MediaError]) -> None:
        """Hold what the files are against what they should be."""
        for item in self.listing.items:
            look = looks[self._item(item).key]
            if isinstance(look, MediaError):
                self.problems.add(item.name, look.file, look.reason)
                continue
            beside = {found.identity: looks[self._beside(found).key] for found in _belonging(item)}
            for reason in check_conditions(self.directory, item, look.info, beside, self.fps):
                self.problems.add(item.name, item.row or item.found.file, reason)
            if item.name not in self.problems.files:
                self.looks.append((item, look))
                self.conditions |= beside

    def plan(self, rules: SizeRules) -> None:
        """Find the buckets of the items, and which parts of a clip are used."""
        settings, report = self.settings, self.report
        choosers = [Chooser(group, rules, self.fps, settings.no_upscale) for group in buckets_for(settings, rules)]
        known: dict[tuple[MediaInfo, tuple[int, int] | None], tuple[list[Bucket], str]] = {}
        base = as_fraction(settings.num_repeats)
        given, repeats = Fraction(1), base
        for item, look in self.looks:
            info, size = look.info, _size(item)
            if (info, size) not in known:
                chosen = [chooser.choose(info, size) for chooser in choosers]
                buckets = sorted({bucket for bucket in chosen if isinstance(bucket, Bucket)})
                known[info, size] = buckets, next((reason for reason in chosen if isinstance(reason, str)), "")
            buckets, reason = known[info, size]
            report.pictures += info.fps is None
            report.clips += info.fps is not None
            if not buckets:
                report.unused[item.name] = reason
                continue
            if item.repeats is not given:
                given, repeats = item.repeats, base * item.repeats
            for bucket in buckets:
                starts = [0]
                if info.fps is not None:
                    available = frames_at(info, self.fps)
                    starts = first_frames(settings.video_clip_mode, available, bucket.frames, settings.clips_per_video)
                    if over := left_over(settings.video_clip_mode, available, bucket.frames):
                        report.left_over[f"{item.name}@{bucket}"] = over
                report.buckets[bucket] += len(starts)
                for part, start in enumerate(starts):
                    self.planned.append(_Planned(item, look, bucket, start, part, repeats))
            report.uncaptioned += item.name in self.listing.uncaptioned
            if self.directory.alpha_mask or self.directory.mask_path or item.mask:
                masked = item.mask is not None or bool(look.alpha)
                report.masked += masked
                report.unmasked += not masked
            report.known_frames += bool(item.known_frames)

    @property
    def total(self) -> Fraction:
        """How many samples an epoch would show, before directories are weighed against each other."""
        times = Counter(id(planned.repeats) for planned in self.planned)  # objects: a fraction's hash takes longer than the rest
        each = {id(planned.repeats): planned.repeats for planned in self.planned}
        return sum((each[place] * number for place, number in times.items()), Fraction(0))

    def samples(self, scale: Fraction, seed: int | None) -> list[Sample]:
        """The samples; their repeats are the planned ones times ``scale``."""
        given, repeats = Fraction(0), Fraction(0)
        shares: dict[tuple[tuple[int, int], Bucket, Framing], tuple[float, float]] = {}
        cropped, samples = 0.0, []
        latest: Item | None = None
        for planned in self.planned:
            item, look, bucket = planned.item, planned.look, planned.bucket
            if item is not latest:  # what the samples of one item have in common
                latest = item
                first, texts = self._texts(item, seed)
                framing = self._framing(item, seed)
                is_clip = look.info.fps is not None
                size = (look.info.width, look.info.height)
                mask, controls, known_frames = self._conditions(item)
            if planned.repeats is not given:
                given, repeats = planned.repeats, planned.repeats * scale
            key = f"{self.name}/{item.name}@{bucket}" + (f"+{planned.first_frame}" if planned.part else "")
            samples.append(
                Sample(
                    key=key,
                    file=item.found.file,
                    content=look.content,
                    caption=first,
                    bucket=bucket,
                    fps=self.fps if is_clip else None,
                    first_frame=planned.first_frame,
                    repeats=repeats,
                    controls=controls,
                    original_size=size,
                    captions=texts,
                    caption_dropout=self.settings.caption_dropout if seed is not None else 0.0,
                    framing=framing,
                    reading=self.reading,
                    mask=mask,
                    alpha_mask=bool(look.alpha) and mask is None,
                    known_frames=known_frames,
                    loss_weight=self.directory.loss_weight,
                )
            )
            alike = (size, bucket, framing if framing.box else CENTRE)
            if alike not in shares:
                shares[alike] = (
                    cropped_share(size, (bucket.width, bucket.height), framing),
                    enlargement(size, (bucket.width, bucket.height), framing),
                )
            share, larger = shares[alike]
            cropped += share
            if share > self.report.cropped_most:
                self.report.cropped_most, self.report.most_cropped = share, key
            if larger > 1:
                self.report.upscaled[key] = round(larger, 4)
        self.report.cropped_mean = cropped / len(samples) if samples else 0.0
        return samples

    def _texts(self, item: Item, seed: int | None) -> tuple[str, tuple[Caption, ...]]:
        """The item's first caption and, if training may show others, all of them."""
        captions = self.captions[item.name]
        first = first_caption(captions, self.settings)
        if seed is None or (len(captions) == 1 and not may_vary(self.settings)):
            return first, ()
        texts = variants(captions, f"{self.name}/{item.name}", seed, self.settings)
        return first, () if len(texts) == 1 and texts[0].text == first else texts

    def _framing(self, item: Item, seed: int | None) -> Framing:
        """The item's box, and the middle of it or a place that hangs on the seed and the item."""
        if self.settings.crop != "random":
            return Framing(item.box) if item.box else CENTRE
        drawn = seed_from(seed or 0, f"{self.name}/{item.name}", "crop")
        x, y = (round((drawn >> bits) % 2**31 / 2**31, 4) for bits in (0, 31))
        return Framing(item.box, x, y)

    def _conditions(self, item: Item):
        """The mask, control pictures and given frames."""

        def control(found: Found) -> Control:
            return Control(found.file, self.conditions[found.identity].content)

        mask = control(item.mask) if item.mask else None
        frames = tuple((end, control(found)) for end, found in item.known_frames.items())
        return mask, tuple(map(control, item.controls)), frames


def _belonging(item: Item) -> list[Found]:
    return [found for found in (item.mask, *item.controls, *item.known_frames.values()) if found]


def _size(item: Item) -> tuple[int, int] | None:
    """(width, height) of the item's box."""
    return (item.box[2] - item.box[0], item.box[3] - item.box[1]) if item.box else None
