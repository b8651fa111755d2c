"""One ``[[directory]]`` on the way from its files to its samples."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from PIL import ImageColor

from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.captions.parsing import read_captions
from utils.data.captions.variants import first_caption, may_vary, variants
from utils.data.media.files import MediaError, printable
from utils.data.media.framing import cropped_share, enlargement
from utils.data.media.pixels import MediaInfo, frames_at
from utils.data.sources.buckets import Chooser, buckets_for
from utils.data.sources.clip_parts import first_frames, left_over
from utils.data.sources.conditions import add_conditions, check_conditions
from utils.data.sources.listing import Found, Item, Listing, Problems
from utils.data.sources.looks import FileMemory, Look, Wanted
from utils.data.sources.places import list_directory
from utils.data.sources.repeats import as_fraction
from utils.data.sources.report import DirectoryReport
from utils.data.values import CENTRE, Bucket, Caption, Control, ControlRules, Framing, Reading, Sample, SizeRules
from utils.draw import seed_from


@dataclass(slots=True)
class Planned:
    """A sample that is not made yet."""

    item: Item
    look: Look
    bucket: Bucket
    first_frame: int
    part: int
    """Which part of its clip it is, from 0."""
    repeats: Fraction


@dataclass
class Directory:
    """One ``[[directory]]`` on the way from its files to its samples."""

    name: str
    config: DirectoryConfig
    settings: DatasetConfig
    listing: Listing
    captions: dict[str, tuple[Caption, ...]]
    reading: Reading
    fps: float | None
    problems: Problems
    report: DirectoryReport
    items: list[Wanted] = field(default_factory=list)
    """The listing's items, in its order."""
    looks: list[tuple[Item, Look]] = field(default_factory=list)
    """Items that can be used."""
    conditions: dict[str, Look] = field(default_factory=dict)
    """What belongs to them, by the files' identities."""
    planned: list[Planned] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        name: str,
        directory: DirectoryConfig,
        settings: DatasetConfig,
        rules: SizeRules,
        controls: ControlRules,
        memory: FileMemory,
    ) -> "Directory":
        """What lies there, with captions, masks and the like, all of it unopened."""
        found = Problems()
        listing = list_directory(directory, settings, memory, found)
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
            controls=max((len(item.controls) for item in listing.items), default=0),
            unused={printable(name): reason for name, reason in listing.unused.items()},
            stray=stray,
            ignored=+listing.ignored,
        )
        fps = settings.fps or rules.fps
        return cls(name, directory, settings, listing, captions, reading, fps, found, report)

    def wanted(self) -> Iterator[Wanted]:
        """Every file that has to be looked at."""
        for item in self.listing.items:
            alpha = self.config.alpha_mask and item.mask is None
            self.items.append(Wanted(item.found, self.reading, alpha))
            yield self.items[-1]
            for found in _belonging(item):
                yield self._beside(found)

    def _beside(self, found: Found) -> Wanted:
        return Wanted(found, self.reading)

    def check(self, looks: dict[str, Look | MediaError]) -> None:
        """Hold what the files are against what they should be."""
        given_frames = self.config.first_frame_path or self.config.last_frame_path
        for item, wanted in zip(self.listing.items, self.items, strict=True):
            look = looks[wanted.key]
            if isinstance(look, MediaError):
                self.problems.add(item.name, look.file, look.reason)
                continue
            if given_frames or item.box or _belonging(item):
                beside = {found.identity: looks[self._beside(found).key] for found in _belonging(item)}
                for reason in check_conditions(self.config, item, look.info, beside, self.fps):
                    self.problems.add(item.name, item.row or item.found.file, reason)
                self.conditions |= beside
            if item.name not in self.problems.files:
                self.looks.append((item, look))

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
                    self.planned.append(Planned(item, look, bucket, start, part, repeats))
            report.uncaptioned += item.name in self.listing.uncaptioned
            if self.config.alpha_mask or self.config.mask_path or item.mask:
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
                conditions = self._conditions(item)
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
                    original_size=size,
                    captions=texts,
                    caption_dropout=self.settings.caption_dropout if seed is not None else 0.0,
                    framing=framing,
                    reading=self.reading,
                    alpha_mask=bool(look.alpha) and item.mask is None,
                    loss_weight=self.config.loss_weight,
                    **conditions,
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

    def _conditions(self, item: Item) -> dict[str, Any]:
        """The fields of a sample that hold its mask, control pictures and given frames."""

        def control(found: Found) -> Control:
            return Control(found.file, self.conditions[found.identity].content)

        if not _belonging(item):
            return {}
        return {
            "mask": control(item.mask) if item.mask else None,
            "controls": tuple(map(control, item.controls)),
            "known_frames": tuple((end, control(found)) for end, found in item.known_frames.items()),
        }


def _belonging(item: Item) -> list[Found]:
    beside = [*item.controls, *item.known_frames.values()]
    return [item.mask, *beside] if item.mask else beside


def _size(item: Item) -> tuple[int, int] | None:
    """(width, height) of the item's box."""
    return (item.box[2] - item.box[0], item.box[3] - item.box[1]) if item.box else None
