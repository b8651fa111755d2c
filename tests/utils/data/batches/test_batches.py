"""Micro-batches from the cache: in order, the same however many workers read them, and what is read ahead."""

from pathlib import Path

import pytest
import torch

from tests.utils.data.encode_worker import Bytes, Pooling, samples_of
from utils.data.batches.loader import AHEAD, BatchLoader, Timed
from utils.data.batches.order import EpochOrder, MicroBatchPlan
from utils.data.batches.workers import WorkerPool
from utils.data.cache import DatasetCache
from utils.data.values import Batch, MicroBatch, Sample
from utils.draw import Draw
from utils.errors import UserError


@pytest.fixture
def encoded(mixed: Path, tmp_path: Path) -> tuple[DatasetCache, list[Sample], list]:
    samples, encoders, cache = samples_of(mixed), [Pooling(), Bytes()], DatasetCache(tmp_path / "cache")
    cache.build(samples, encoders, device=torch.device("cpu"))
    return cache, samples, encoders


def prepare(batch: Batch, draw: Draw) -> MicroBatch:
    noise = torch.stack([draw.normal(key, "noise", (3,)) for key in batch.keys])
    return MicroBatch(
        {"mean": torch.stack(batch.fields["mean"]) + noise}, {"lengths": torch.tensor([*map(len, batch.fields["text"])])}
    )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_with_the_samples_values(encoded, num_workers: int):
    cache, samples, encoders = encoded
    order, draw = EpochOrder(samples, 2, 0), Draw(0, 0)
    plans = order.micro_batches(0) * 3
    with WorkerPool(num_workers) as workers:
        loader = BatchLoader(cache, samples, encoders, prepare, workers)
        found = list(loader.prepared((plan, draw) for plan in plans))
    assert len(found) == len(plans)
    for plan, micro_batch in zip(plans, found, strict=True):
        rows = [cache.read(next(entry for entry in samples if entry.key == key), encoders) for key, _ in plan.members]
        expected = prepare(Batch(plan.keys, {name: [row[name] for row in rows] for name in rows[0]}), draw)
        assert torch.equal(micro_batch.inputs["mean"], expected.inputs["mean"])
        assert torch.equal(micro_batch.target["lengths"], expected.target["lengths"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_plan_is_read_a_few_ahead(encoded, num_workers: int):
    cache, samples, encoders = encoded
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield MicroBatchPlan.single(asked, samples[asked % len(samples)].key), Draw(0, 0)

    with WorkerPool(num_workers) as workers:
        batches = BatchLoader(cache, samples, encoders, prepare, workers).prepared(endless())
        for taken in range(1, 20):
            next(batches)
            assert asked == taken - 1 + max(1, AHEAD * num_workers)


def test_data_sets_share_the_workers_and_do_not_wait_for_each_other(encoded):
    """As an evaluation in the middle of training, which may be ended early."""
    cache, samples, encoders = encoded
    plans = [MicroBatchPlan.single(index, entry.key) for index, entry in enumerate(samples)]
    with WorkerPool(2) as workers:
        one, other = (BatchLoader(cache, samples, encoders, prepare, workers) for _ in range(2))
        training = one.prepared((plan, Draw(0, 0)) for plan in plans * 4)
        seen = [next(training) for _ in range(3)]
        held_out = other.prepared((plan, Draw(0, -1, fixed_time=0.5)) for plan in plans)
        next(held_out)
        held_out.close()
        found = list(other.prepared((plan, Draw(0, -1, fixed_time=0.5)) for plan in plans))
        seen += list(training)
    alone = BatchLoader(cache, samples, encoders, prepare, WorkerPool(0))
    for loaded, draw, times in ((seen, Draw(0, 0), 4), (found, Draw(0, -1, fixed_time=0.5), 1)):
        expected = list(alone.prepared((plan, draw) for plan in plans * times))
        assert len(loaded) == len(expected)
        assert all(torch.equal(a.inputs["mean"], b.inputs["mean"]) for a, b in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [RuntimeError, UserError])
def test_what_a_worker_raises_is_raised_in_its_turn(encoded, num_workers: int, kind: type[Exception]):
    cache, samples, encoders = encoded
    plans = [MicroBatchPlan.single(index, entry.key) for index, entry in enumerate(samples)]

    def failing(batch: Batch, draw: Draw) -> MicroBatch:
        if batch.keys == plans[3].keys:
            raise kind(f"cannot prepare {batch.keys}")
        return prepare(batch, draw)

    with WorkerPool(num_workers) as workers:
        batches = BatchLoader(cache, samples, encoders, failing, workers).prepared((plan, Draw(0, 0)) for plan in plans)
        assert len([next(batches) for _ in range(3)]) == 3
        with pytest.raises(kind, match="cannot prepare"):
            next(batches)


def test_the_time_of_waiting_is_counted(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 0.5, 10.0, 10.25, 20.0, 21.0])
    monkeypatch.setattr("utils.data.batches.loader.time.perf_counter", lambda: next(clock))
    batches = Timed(iter([MicroBatch({}, {}), MicroBatch({}, {})]))
    next(batches), next(batches)
    assert batches.taken() == 0.75
    assert batches.taken() == 0.0
    with pytest.raises(StopIteration):
        next(batches)
    assert batches.taken() == 1.0
