"""Micro-batches from the cache, read and prepared ahead of training."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

from torch import Tensor

from utils.data.batches.loss_terms import MASK, with_loss_terms
from utils.data.batches.order import MicroBatchPlan
from utils.data.batches.workers import WorkerPool
from utils.data.cache import DatasetCache
from utils.data.captions.variants import as_shown
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, MicroBatch, Sample
from utils.draw import Draw

AHEAD = 2
"""Micro-batches that are asked for ahead, for each worker."""


class BatchLoader:
    """One data set's micro-batches.  It talks to no other rank.

    ``prepare`` makes what the model is fed of what the cache has; the samples' masks and weights are added to that.  In evaluation
    (``draw.fixed_time``) weights are left out: each held-out sample counts the same.
    """

    def __init__(
        self,
        cache: DatasetCache,
        samples: Sequence[Sample],
        encoders: Sequence[ConditionEncoder],
        prepare: Callable[[Batch, Draw], MicroBatch],
        workers: WorkerPool,
    ):
        """``workers``: not started yet; several loaders may share them.  Without any, micro-batches are made when asked for."""
        self.cache, self.encoders, self.prepare, self.workers = cache, encoders, prepare, workers
        self._samples = {sample.key: sample for sample in samples}
        self._function = workers.add(self.micro_batch)

    def read(self, plan: MicroBatchPlan, draw: Draw) -> Batch:
        """The cached tensors that a family works with, with this draw's captions.  Raises UserError if the cache has lost them."""
        return self._read(plan, draw)[0]

    def _read(self, plan: MicroBatchPlan, draw: Draw) -> tuple[Batch, list[Tensor | None]]:
        """And the samples' masks."""
        places = zip(plan.members, plan.keys, strict=True)
        samples = [as_shown(self._samples[sample], place, draw) for (sample, _), place in places]
        rows = [self.cache.read(sample, self.encoders) for sample in samples]
        masks = [row.pop(MASK, None) for row in rows]
        return Batch(plan.keys, {name: [row[name] for row in rows] for name in rows[0]}), masks

    def micro_batch(self, plan: MicroBatchPlan, draw: Draw) -> MicroBatch:
        batch, masks = self._read(plan, draw)
        weighs = draw.fixed_time is None
        weights = [self._samples[sample].loss_weight if weighs else 1.0 for sample, _ in plan.members]
        return with_loss_terms(self.prepare(batch, draw), masks, weights)

    def prepared(self, work: Iterable[tuple[MicroBatchPlan, Draw]]) -> Iterator[MicroBatch]:
        """The micro-batches in the order of ``work``, which may be endless: it is asked for ``AHEAD`` for each worker at most.

        What a worker raises is raised here, in its turn.
        """
        if not self.workers.number:
            yield from (self.micro_batch(plan, draw) for plan, draw in work)
            return
        source = iter(work)
        waiting: deque[Future[MicroBatch]] = deque()
        while True:
            while len(waiting) < AHEAD * self.workers.number and (entry := next(source, None)):
                waiting.append(self.workers.submit(self._function, *entry))
            if not waiting:
                return
            yield waiting.popleft().result()


class Timed(Iterator[MicroBatch]):
    """The same micro-batches, with the time that was spent on waiting for them."""

    def __init__(self, batches: Iterator[MicroBatch]):
        self._batches = batches
        self._seconds = 0.0

    def __next__(self) -> MicroBatch:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._seconds += time.perf_counter() - began

    def taken(self) -> float:
        """Seconds since the last call of this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
