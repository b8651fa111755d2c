"""The order of an epoch: which samples travel together, and when.

The order is a pure function of the samples' keys, the seed and the epoch, so a position in it is one number, and it does not
depend on how a step is divided over replicas and accumulation, nor on who reads it.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

import torch

from utils.data.batches.sizes import BatchSizes
from utils.data.batches.turns import Turns
from utils.data.values import Bucket, Sample
from utils.draw import generator
from utils.words import count

Alike = tuple[Bucket, int]
"""What samples of one micro-batch have in common: the bucket, and the number of control pictures."""
Members = tuple[tuple[str, int], ...]
"""Samples' keys, each with the number of times that the epoch has shown the sample before."""

EPOCHS_KEPT = 3
"""Epochs whose order is remembered: while one is trained, the next is read ahead."""


@dataclass(frozen=True)
class MicroBatchPlan:
    """Which samples travel through the pipeline together; all are of one bucket and have as many control pictures."""

    index: int
    """Its place in the list that it came from: for a training step, in the global batch."""
    members: Members

    @classmethod
    def single(cls, index: int, sample: str) -> "MicroBatchPlan":
        """One sample alone, as evaluation sees it."""
        return cls(index, ((sample, 0),))

    @property
    def keys(self) -> list[str]:
        """``<sample key>#<occurrence>``: the places that random draws are made for."""
        return [f"{sample}#{occurrence}" for sample, occurrence in self.members]


@dataclass(frozen=True)
class BucketCounts:
    """What an epoch shows of one bucket."""

    bucket: Bucket
    num_controls: int
    """Control pictures of each sample."""
    samples: int
    """Different ones in the data set."""
    tokens: int | None
    """Of a sample in the model, where the rules for sizes are known."""
    shown: int
    """Appearances of the samples, repeats included."""
    batch_size: int
    micro_batches: int

    @property
    def filled_up(self) -> int:
        """Appearances beyond ``shown``, which complete the last micro-batch."""
        return self.micro_batches * self.batch_size - self.shown

    def __str__(self) -> str:
        controls = f" with {self.num_controls} control pictures" if self.num_controls else ""
        tokens = f" of {self.tokens} tokens" if self.tokens is not None else ""
        filled_up = f", {self.filled_up} of them once more" if self.filled_up else ""
        shown = f"shown {count(self.shown, 'time')} in {count(self.micro_batches, 'micro-batch', 'micro-batches')}"
        return f"{self.bucket}{controls}: {count(self.samples, 'sample')}{tokens}, {shown} of {self.batch_size}{filled_up}"


@dataclass(frozen=True)
class EpochCounts:
    """What an epoch is made of."""

    epoch: int
    buckets: list[BucketCounts]
    micro_batches_per_step: int
    filled_up_step: int
    """Samples that complete the last step, beyond those that complete buckets."""
    mean_shown: Fraction
    """Appearances in an epoch on average, where ``shown`` differs between epochs."""

    @property
    def shown(self) -> int:
        return sum(bucket.shown for bucket in self.buckets)

    @property
    def filled_up(self) -> int:
        """Samples that complete a bucket's last micro-batch."""
        return sum(bucket.filled_up for bucket in self.buckets)

    @property
    def steps(self) -> int:
        return -(-sum(bucket.micro_batches for bucket in self.buckets) // self.micro_batches_per_step)

    def lines(self) -> list[str]:
        """For the log: the whole, and each bucket."""
        whole, *filled_up = self.summary()
        return [whole, *(f"  {bucket}" for bucket in self.buckets), *(f"  {line}" for line in filled_up)]

    def summary(self) -> list[str]:
        """The whole, and what completes it."""
        sizes = {bucket.batch_size for bucket in self.buckets}
        per_step = f"{self.micro_batches_per_step * min(sizes)}"
        if len(sizes) > 1:
            per_step = f"{self.micro_batches_per_step} micro-batches, of {min(sizes)} to {max(sizes)} samples"
        always = self.mean_shown == self.shown
        which = "an epoch" if always else f"epoch {self.epoch + 1}"
        mean = "" if always else f"; {float(self.mean_shown):g} samples an epoch on average"
        different = sum(bucket.samples for bucket in self.buckets)
        steps = f"{count(self.steps, 'step')} of {per_step}"
        lines = [f"{which}: {count(self.shown, 'sample')} ({different} different) in {steps}{mean}"]
        for number, what in ((self.filled_up, "micro-batch of a bucket"), (self.filled_up_step, "step of the epoch")):
            if number:
                lines.append(f"{count(number, 'sample is', 'samples are')} shown once more, to fill the last {what}")
        return lines


@dataclass(frozen=True)
class _Epoch:
    """One epoch in its order."""

    micro_batches: list[Members]
    ends: list[int]
    """Samples of the epoch up to the end of each micro-batch."""
    shown: dict[str, int]
    """How often each sample is in it."""


class _Group:
    """Samples that may share a micro-batch."""

    def __init__(self, alike: Alike, samples: list[Sample], batch_size: int, seed: int):
        bucket, controls = alike
        self.alike, self.samples, self.batch_size, self.seed = alike, samples, batch_size, seed
        self.name = f"{bucket}" + (f" with {controls} control pictures" if controls else "")
        by_repeats: dict[Fraction, list[int]] = {}
        for place, sample in enumerate(samples):
            by_repeats.setdefault(sample.repeats, []).append(place)
        self.turns = [
            (Turns(len(places), repeats, seed, f"turns of {self.name}, {repeats} times an epoch"), places)
            for repeats, places in by_repeats.items()
        ]

    def num_shown(self, epoch: int) -> int:
        return sum(turns.total(epoch) for turns, _ in self.turns)

    def num_micro_batches(self, epoch: int) -> int:
        return -(-self.num_shown(epoch) // self.batch_size)

    def counts(self, epoch: int, tokens: int | None) -> BucketCounts:
        sizes = (self.num_shown(epoch), self.batch_size, self.num_micro_batches(epoch))
        return BucketCounts(*self.alike, len(self.samples), tokens, *sizes)

    def micro_batches(self, epoch: int) -> tuple[list[Members], Counter[str]]:
        """The samples, shuffled, in micro-batches of which the last is completed from the start; and how often each is shown."""
        times = [0] * len(self.samples)
        for turns, places in self.turns:
            for place, number in zip(places, turns.times(epoch), strict=True):
                times[place] = number
        keys = [sample.key for sample in self.samples]
        members = [(key, occurrence) for key, number in zip(keys, times, strict=True) for occurrence in range(number)]
        order = torch.randperm(len(members), generator=generator(self.seed, epoch, f"order of {self.name}")).tolist()
        shuffled = [members[place] for place in order]
        shown = Counter({key: number for key, number in zip(keys, times, strict=True) if number})
        lacking = -len(members) % self.batch_size
        shuffled += _shown_again([shuffled[place % len(members)][0] for place in range(lacking)], shown)
        return [tuple(shuffled[at : at + self.batch_size]) for at in range(0, len(shuffled), self.batch_size)], shown


class EpochOrder:
    """Micro-batches of every epoch.

    In an epoch each sample appears ``repeats`` times (see ``turns.py`` where that is no whole number), shuffled within its bucket
    (samples with another number of control pictures count as another bucket); micro-batches of all buckets are shuffled among
    each other.  Nothing is dropped: what is missing from a bucket's last micro-batch, or from an epoch's last step,
    is filled with samples that the epoch shows once more.  Every appearance has another occurrence number and so draws other noise.
    Epochs may differ in length, down to none at all; only the epochs that are asked for are put in order.
    """

    def __init__(self, samples: Sequence[Sample], sizes: BatchSizes | int, seed: int):
        """``sizes``: a number is the size of all micro-batches."""
        self.samples = sorted(samples, key=lambda sample: sample.key)
        self.sizes = sizes if isinstance(sizes, BatchSizes) else BatchSizes(sizes)
        self.seed = seed
        alike: dict[Alike, list[Sample]] = {}
        for sample in self.samples:
            alike.setdefault((sample.bucket, len(sample.controls)), []).append(sample)
        self._groups = [_Group(key, alike[key], self.sizes.of_bucket(key[0]), seed) for key in sorted(alike)]
        self._epochs: dict[int, _Epoch] = {}

    # ── how much there is ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def batch_sizes(self) -> dict[Bucket, int]:
        """Samples of a micro-batch, for each bucket of the data."""
        return {group.alike[0]: group.batch_size for group in self._groups}

    def num_samples(self, epoch: int) -> int:
        """Samples of an epoch, repeats that were asked for included, those that fill up batches not."""
        return sum(group.num_shown(epoch) for group in self._groups)

    def num_micro_batches(self, epoch: int) -> int:
        """Of an epoch, without those that complete its last step."""
        return sum(group.num_micro_batches(epoch) for group in self._groups)

    def num_steps(self, epoch: int, micro_batches_per_step: int) -> int:
        return -(-self.num_micro_batches(epoch) // micro_batches_per_step)

    def total_steps(self, first_epoch: int, stop_epoch: int, micro_batches_per_step: int) -> int:
        """Of all epochs from ``first_epoch`` on, ``stop_epoch`` not included.  No epoch is put in order for it."""

        def steps(start: int, stop: int) -> int:
            return sum(self.num_steps(epoch, micro_batches_per_step) for epoch in range(start, stop))

        period = lcm(*(turns.period for group in self._groups for turns, _ in group.turns))
        number = max(0, stop_epoch - first_epoch)
        if number <= period:
            return steps(first_epoch, first_epoch + number)
        whole, rest = divmod(number, period)
        return whole * steps(first_epoch, first_epoch + period) + steps(first_epoch, first_epoch + rest)

    def next_epoch(self, epoch: int) -> int:
        """The first epoch from this one on that shows a sample."""
        return min(turns.next_shown(epoch) for group in self._groups for turns, _ in group.turns)

    # ── the order ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def micro_batches(self, epoch: int) -> list[MicroBatchPlan]:
        """The whole epoch in its order, without what completes the last step."""
        return [MicroBatchPlan(index, members) for index, members in enumerate(self._epoch(epoch).micro_batches)]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._ordered(epoch)
        return self._epochs[epoch]

    def _ordered(self, epoch: int) -> _Epoch:
        found: list[Members] = []
        shown: dict[str, int] = {}
        for group in self._groups:
            micro_batches, of_group = group.micro_batches(epoch)
            found += micro_batches
            shown.update(of_group)
        order = torch.randperm(len(found), generator=generator(self.seed, epoch, "order of micro-batches")).tolist()
        ordered = [found[place] for place in order]
        return _Epoch(ordered, list(accumulate(map(len, ordered))), shown)

    def micro_batch_at(self, epoch: int, sample: int) -> int:
        """Index of the micro-batch that the epoch's ``sample``-th sample is in, from 0; behind the end the number of them."""
        return bisect_right(self._epoch(epoch).ends, sample) if sample else 0

    def samples_before(self, epoch: int, micro_batch: int) -> int:
        """Samples of the epoch before its micro-batch of this index."""
        return self._epoch(epoch).ends[micro_batch - 1] if micro_batch else 0

    def global_batch(self, epoch: int, first_micro_batch: int, micro_batches_per_step: int) -> list[MicroBatchPlan]:
        """The micro-batches of one step, from ``first_micro_batch`` of the epoch on; replica r of n takes those at ``[r::n]``.

        The last step of an epoch is completed with micro-batches from the epoch's start.
        """
        found = self._epoch(epoch)
        number = len(found.micro_batches)
        assert 0 <= first_micro_batch < number, f"micro-batch {first_micro_batch} of an epoch of {number}"
        step = found.micro_batches[first_micro_batch : first_micro_batch + micro_batches_per_step]
        if lacking := micro_batches_per_step - len(step):
            again = [found.micro_batches[place % number] for place in range(lacking)]
            shown = Counter({sample: found.shown[sample] for members in again for sample, _ in members})
            step += [_shown_again([sample for sample, _ in members], shown) for members in again]
        return [MicroBatchPlan(index, members) for index, members in enumerate(step)]

    # ── what is said of it ────────────────────────────────────────────────────────────────────────────────────────────────

    def counts(self, micro_batches_per_step: int, epoch: int = 0) -> EpochCounts:
        """What an epoch is made of, by bucket.  Buckets that it does not show are there too."""
        return EpochCounts(
            epoch,
            [group.counts(epoch, self.sizes.tokens(group.alike[0])) for group in self._groups],
            micro_batches_per_step,
            self._filled_up_step(epoch, micro_batches_per_step),
            sum((sample.repeats for sample in self.samples), Fraction()),
        )

    def _filled_up_step(self, epoch: int, micro_batches_per_step: int) -> int:
        number = self.num_micro_batches(epoch)
        lacking = -number % micro_batches_per_step
        if len(set(self.batch_sizes.values())) == 1:
            return lacking * self._groups[0].batch_size
        again = [self._epoch(epoch).micro_batches[place % number] for place in range(lacking)]
        return sum(map(len, again))

    def report(self, micro_batches_per_step: int) -> list[str]:
        """For the log and ``--check``: what the first epoch that shows something is made of."""
        return self.counts(micro_batches_per_step, self.next_epoch(0)).lines()

    def warnings(self) -> list[str]:
        """Buckets whose samples are too large for the budget of tokens."""
        return [problem for bucket in self.batch_sizes if (problem := self.sizes.problem(bucket))]


def _shown_again(samples: list[str], shown: Counter[str]) -> Members:
    """The samples with their next occurrences; ``shown`` counts on."""
    members = []
    for sample in samples:
        members.append((sample, shown[sample]))
        shown[sample] += 1
    return tuple(members)
