"""What there is to say of a data set before training: facts, without their form."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from utils.data.batches.order import BucketCounts, EpochOrder
from utils.data.captions.variants import texts_of
from utils.data.encoders import ConditionEncoder, TokenLength
from utils.data.media.pixels import covering, cropped_share, enlargement
from utils.data.sources.report import DirectoryReport
from utils.data.sources.scan import Scan
from utils.data.values import Bucket, Sample, SizeRules


@dataclass(frozen=True)
class Cut:
    """What of its file a sample shows, and how large."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom, each from 0 to 1 of the file's width or height as it is displayed."""
    cropped: float
    """The share of the file's pixels that is not seen, from 0 to 1."""
    scale: float
    """Length of its sides in the bucket over that in the file: above 1 the file is enlarged."""


def cut_of(sample: Sample) -> Cut | None:
    """None for a sample whose file's size is not known."""
    if sample.original_size is None:
        return None
    size, target = sample.original_size, (sample.bucket.width, sample.bucket.height)
    cover = covering(size, target, sample.framing)
    left, top, right, bottom = cover.box or (0, 0, *size)
    across, down = (right - left) / cover.width, (bottom - top) / cover.height
    left, top = left + cover.left * across, top + cover.top * down
    right, bottom = left + target[0] * across, top + target[1] * down
    box = (left / size[0], top / size[1], right / size[0], bottom / size[1])
    return Cut(box, cropped_share(size, target, sample.framing), enlargement(size, target, sample.framing))


@dataclass(frozen=True)
class BucketFindings:
    """The samples of one bucket."""

    bucket: Bucket
    tokens: int
    """Of a sample in the model, without text and control pictures."""
    samples: Sequence[Sample]
    epoch: Sequence[BucketCounts] = ()
    """What an epoch shows of them, those with as many control pictures together; none for data that are evaluated, one by one."""

    @property
    def shown(self) -> int:
        """Samples of an epoch, with their repeats."""
        return sum(part.shown for part in self.epoch)

    @property
    def batch_size(self) -> int:
        return self.epoch[0].batch_size

    @property
    def batches(self) -> int:
        return sum(part.micro_batches for part in self.epoch)

    @property
    def again(self) -> int:
        """Samples that an epoch shows once more, to fill the last batch."""
        return sum(part.filled_up for part in self.epoch)


@dataclass(frozen=True)
class CaptionFindings:
    """How long the captions are for one text encoder, or for several that count alike."""

    encoders: tuple[str, ...]
    lengths: dict[tuple[str, int], TokenLength]
    """By caption and number of control pictures."""

    @property
    def limit(self) -> int:
        return next(iter(self.lengths.values())).limit

    @cached_property
    def spread(self) -> tuple[int, float, int]:
        """Tokens of the shortest, the median and the longest caption."""
        tokens = [length.tokens for length in self.lengths.values()]
        return min(tokens), statistics.median(tokens), max(tokens)

    @cached_property
    def num_cut(self) -> int:
        return sum(length.is_cut for length in self.lengths.values())

    def longest_of(self, sample: Sample) -> TokenLength:
        return max((self.lengths[place] for place in captions_of(sample)), key=lambda length: length.tokens)


@dataclass(frozen=True)
class DataFindings:
    """All of one data set: the training data, or held-out data."""

    name: str
    scan: Scan
    buckets: list[BucketFindings]
    captions: list[CaptionFindings]
    folders: Sequence[Path] = ()
    """Where the files are, and what belongs to them: of their paths nothing but their names is told."""
    notes: list[str] = field(default_factory=list)
    """Sentences on the whole: how long an epoch is."""

    @property
    def samples(self) -> list[Sample]:
        return self.scan.samples

    def trained(self, order: EpochOrder, micro_batches_per_step: int, told: str) -> "DataFindings":
        """The same with the batches that the first epoch makes of the samples; ``told``: how long the run is."""
        counts = order.counts(micro_batches_per_step, order.next_epoch(0))
        epoch: dict[Bucket, list[BucketCounts]] = {}
        for part in counts.buckets:
            epoch.setdefault(part.bucket, []).append(part)
        buckets = [replace(part, epoch=epoch[part.bucket]) for part in self.buckets]
        return replace(self, buckets=buckets, notes=[*counts.summary(), *order.warnings(), told])

    def without_paths(self, text: str, directory: DirectoryReport) -> str:
        """A text on a file of a directory, which may hold paths: files of the directory are called by their names in it."""
        text = text.replace(f"{directory.path}/", "").replace(f"{directory.path.resolve()}/", "")
        for parent in self._parents:
            text = text.replace(f"{parent}/", "")
        return text

    @cached_property
    def _parents(self) -> list[Path]:
        """The longest first.  A list of files may name some of anywhere."""
        files = [sample.file for sample in self.samples]
        files += [control.file for sample in self.samples for control in (*sample.controls, *filter(None, [sample.mask]))]
        places = {*self.folders, *(folder.resolve() for folder in self.folders), *(file.path for file in files)}
        parents = {place.parent for place in places if place.is_absolute()}
        return sorted(parents, key=lambda parent: -len(parent.parts))

    def samples_of(self, directory: DirectoryReport) -> list[Sample]:
        return [sample for sample in self.samples if sample.key.startswith(f"{directory.name}/")]

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """By the samples' keys."""
        return {sample.key: cut for sample in self.samples if (cut := cut_of(sample))}

    @cached_property
    def enlarged(self) -> list[tuple[Sample, float]]:
        """Samples that are larger in their bucket than in their file, and how much, the worst first."""
        found = [(sample, self.cuts[sample.key].scale) for sample in self.samples if sample.key in self.cuts]
        return sorted(((sample, scale) for sample, scale in found if scale > 1), key=lambda entry: -entry[1])


def item_of(sample: Sample) -> str:
    """``<directory's name>/<file>``."""
    return sample.key.rpartition("@")[0]


def captions_of(sample: Sample) -> list[tuple[str, int]]:
    """Every caption that may be shown with a sample, and its number of control pictures."""
    return [(text, len(sample.controls)) for text in texts_of(sample)]


def findings_of(
    name: str, found: Scan, rules: SizeRules, encoders: Sequence[ConditionEncoder], folders: Sequence[Path] = ()
) -> DataFindings:
    """Facts of data that are evaluated one by one.  UserError if a tokenizer cannot be used."""
    grouped: dict[Bucket, list[Sample]] = {}
    for sample in found.samples:
        grouped.setdefault(sample.bucket, []).append(sample)
    buckets = [BucketFindings(bucket, rules.tokens(bucket), samples) for bucket, samples in sorted(grouped.items())]
    return DataFindings(name, found, buckets, count_tokens(found.samples, encoders), folders)


def count_tokens(samples: Sequence[Sample], encoders: Sequence[ConditionEncoder]) -> list[CaptionFindings]:
    """Each different caption is counted once by each encoder that reads captions."""
    texts: dict[int, dict[str, None]] = {}
    for sample in samples:
        for caption, controls in captions_of(sample):
            texts.setdefault(controls, {})[caption] = None
    found: list[CaptionFindings] = []
    for encoder in encoders:
        lengths: dict[tuple[str, int], TokenLength] = {}
        for controls, captions in texts.items():
            counted = encoder.token_lengths(list(captions), controls)
            lengths |= {(caption, controls): length for caption, length in zip(captions, counted, strict=False)}
        alike = next((place for place, other in enumerate(found) if other.lengths == lengths), None)
        if alike is not None:
            found[alike] = CaptionFindings((*found[alike].encoders, encoder.name), lengths)
        elif lengths:
            found.append(CaptionFindings((encoder.name,), lengths))
    return found
