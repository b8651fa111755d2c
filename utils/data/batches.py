"""The order of an epoch, and reading it ahead of training.

The order is a pure function of the samples' keys, the seed and the epoch, so a position in it is one number, and it does not
depend on how a step is divided over replicas and accumulation.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from utils.data.cache import DatasetCache
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, Bucket, MicroBatch, Sample
from utils.data.variants import as_shown
from utils.draw import Draw, generator

Alike = tuple[Bucket, int]
"""What samples of one micro-batch have in common: the bucket, and the number of control pictures."""
Members = tuple[tuple[str, int], ...]
"""Samples' keys, each with the number of times that the epoch has shown the sample before."""


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


class EpochOrder:
    """Micro-batches of every epoch.

    In an epoch each sample appears ``num_repeats`` times, shuffled within its bucket (samples with another number of control
    pictures count as another bucket); micro-batches of all buckets are shuffled among each other.  Nothing is dropped: what is
    missing from a bucket's last micro-batch, or from an epoch's last step, is filled with samples that the epoch shows once more.
    Every appearance has another occurrence number and so draws other noise.
    """

    def __init__(self, samples: Sequence[Sample], micro_batch_size: int, seed: int):
        self.samples = sorted(samples, key=lambda sample: sample.key)
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self._buckets: dict[Alike, list[Sample]] = {}
        for sample in self.samples:
            self._buckets.setdefault((sample.bucket, len(sample.controls)), []).append(sample)
        self._latest: tuple[int, list[MicroBatchPlan]] | None = None

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, repeats that were asked for included, those that fill up batches not."""
        return sum(int(sample.repeats) for sample in self.samples)

    @property
    def num_micro_batches(self) -> int:
        """Of an epoch, without those that complete its last step; the same in every epoch."""
        sizes = [sum(int(sample.repeats) for sample in bucket) for bucket in self._buckets.values()]
        return sum(-(-size // self.micro_batch_size) for size in sizes)

    def steps_per_epoch(self, micro_batches_per_step: int) -> int:
        return -(-self.num_micro_batches // micro_batches_per_step)

    def micro_batches(self, epoch: int) -> list[MicroBatchPlan]:
        """The whole epoch in its order, without what completes the last step."""
        if self._latest is None or self._latest[0] != epoch:
            groups = [members for alike in sorted(self._buckets) for members in self._bucket_groups(alike, epoch)]
            order = torch.randperm(len(groups), generator=generator(self.seed, epoch, "order of micro-batches")).tolist()
            self._latest = (epoch, [MicroBatchPlan(index, groups[place]) for index, place in enumerate(order)])
        return self._latest[1]

    def _bucket_groups(self, alike: Alike, epoch: int) -> list[Members]:
        """One bucket's samples, shuffled, in micro-batches; the last one is completed from the start."""
        samples = self._buckets[alike]
        bucket, controls = alike
        purpose = f"order of {bucket}" + (f" with {controls} control pictures" if controls else "")
        members = [(sample.key, occurrence) for sample in samples for occurrence in range(int(sample.repeats))]
        order = torch.randperm(len(members), generator=generator(self.seed, epoch, purpose)).tolist()
        shuffled = [members[place] for place in order]
        shown = Counter({sample.key: int(sample.repeats) for sample in samples})
        lacking = -len(members) % self.micro_batch_size
        shuffled += _shown_again([shuffled[place % len(members)][0] for place in range(lacking)], shown)
        return [tuple(shuffled[at : at + self.micro_batch_size]) for at in range(0, len(shuffled), self.micro_batch_size)]

    def global_batch(self, epoch: int, first_micro_batch: int, micro_batches_per_step: int) -> list[MicroBatchPlan]:
        """The micro-batches of one step, from ``first_micro_batch`` of the epoch on; replica r of n takes those at ``[r::n]``.

        The last step of an epoch is completed with micro-batches from the epoch's start.
        """
        plans = self.micro_batches(epoch)
        assert 0 <= first_micro_batch < len(plans), f"micro-batch {first_micro_batch} of an epoch of {len(plans)}"
        step = [plan.members for plan in plans[first_micro_batch : first_micro_batch + micro_batches_per_step]]
        if lacking := micro_batches_per_step - len(step):
            shown = Counter(sample for plan in plans for sample, _ in plan.members)
            step += [_shown_again([sample for sample, _ in plans[place % len(plans)].members], shown) for place in range(lacking)]
        return [MicroBatchPlan(index, members) for index, members in enumerate(step)]

    def report(self, micro_batches_per_step: int) -> list[str]:
        """For the log and ``--check``: what an epoch is made of."""
        steps = self.steps_per_epoch(micro_batches_per_step)
        per_step = micro_batches_per_step * self.micro_batch_size
        in_micro_batches = self.num_micro_batches * self.micro_batch_size - self.num_samples
        in_last_step = (steps * micro_batches_per_step - self.num_micro_batches) * self.micro_batch_size
        lines = [f"an epoch: {self.num_samples} samples ({len(self.samples)} different) in {steps} steps of {per_step}"]
        if in_micro_batches:
            lines.append(f"  {in_micro_batches} samples are shown once more, to fill the last micro-batch of a bucket")
        if in_last_step:
            lines.append(f"  {in_last_step} samples are shown once more, to fill the last step of the epoch")
        return lines


def _shown_again(samples: list[str], shown: Counter[str]) -> Members:
    """The samples with their next occurrences; ``shown`` counts on."""
    members = []
    for sample in samples:
        members.append((sample, shown[sample]))
        shown[sample] += 1
    return tuple(members)


class BatchLoader:
    """Reads cached samples and prepares micro-batches in threads, a few ahead of training.  It talks to no other rank."""

    def __init__(self, cache: DatasetCache, samples: Sequence[Sample], encoders: Sequence[ConditionEncoder], num_threads: int):
        self.cache, self.encoders, self.num_threads = cache, encoders, num_threads
        self._samples = {sample.key: sample for sample in samples}

    def read(self, plan: MicroBatchPlan, draw: Draw) -> Batch:
        """The cached tensors of a micro-batch with the captions of this draw.  Raises UserError if the cache has lost them."""
        places = zip(plan.members, plan.keys, strict=True)
        samples = [as_shown(self._samples[sample], place, draw) for (sample, _), place in places]
        rows = [self.cache.read(sample, self.encoders) for sample in samples]
        return Batch(plan.keys, {name: [row[name] for row in rows] for name in rows[0]})

    def prepared(
        self, work: Iterable[tuple[MicroBatchPlan, Draw]], prepare: Callable[[Batch, Draw], MicroBatch]
    ) -> Iterator[MicroBatch]:
        """The micro-batches in the order of ``work``, which may be endless: it is asked for no more than ``2 * num_threads`` ahead.

        What a thread raises is raised here, in its turn.
        """
        source = iter(work)
        waiting: deque[Future[MicroBatch]] = deque()
        pool = ThreadPoolExecutor(self.num_threads)
        try:
            while True:
                while len(waiting) < 2 * self.num_threads and (entry := next(source, None)):
                    waiting.append(pool.submit(self._prepare, *entry, prepare))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, plan: MicroBatchPlan, draw: Draw, prepare: Callable[[Batch, Draw], MicroBatch]) -> MicroBatch:
        return prepare(self.read(plan, draw), draw)
