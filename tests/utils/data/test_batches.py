"""The order of epochs as a pure function, for any data set; and reading it ahead."""

import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.data.encode_worker import Bytes, Pooling, samples_of
from utils.data.batches import BatchLoader, EpochOrder, MicroBatchPlan
from utils.data.cache import DatasetCache
from utils.data.files import DataFile
from utils.data.values import Batch, Bucket, Control, MicroBatch, Sample
from utils.draw import Draw

BUCKETS = [Bucket(64, 64, 1), Bucket(64, 64, 9), Bucket(96, 48, 9)]


def sample(number: int, bucket: Bucket, num_repeats: int, num_controls: int = 0) -> Sample:
    path = Path(f"{number}.mp4")
    controls = tuple(Control(DataFile(Path(f"{number}-{place}.png")), f"{number}-{place}") for place in range(num_controls))
    return Sample(
        f"data/{path.name}@{bucket}",
        DataFile(path),
        f"{number:040}",
        "a caption",
        bucket,
        fps=16.0,
        repeats=Fraction(num_repeats),
        controls=controls,
    )


@st.composite
def orders(draw: st.DrawFn) -> EpochOrder:
    kinds = draw(st.lists(st.tuples(st.sampled_from(BUCKETS), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=25))
    samples = [sample(number, *kind) for number, kind in enumerate(kinds)]
    return EpochOrder(samples, draw(st.integers(1, 5)), draw(st.integers(0, 3)))


def plans_of_epoch(order: EpochOrder, epoch: int, per_step: int) -> list[list[MicroBatchPlan]]:
    return [order.global_batch(epoch, step * per_step, per_step) for step in range(order.steps_per_epoch(per_step))]


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_sample_and_repeats_only_to_fill_up(order: EpochOrder, epoch: int):
    plans = order.micro_batches(epoch)
    assert len(plans) == order.num_micro_batches
    # Tensors of other shapes, or another number of control pictures, could not be stacked.
    kind_of = {entry.key: (entry.bucket, len(entry.controls)) for entry in order.samples}
    assert all(len({kind_of[key] for key, _ in plan.members}) == 1 for plan in plans)
    assert all(len(plan.members) == order.micro_batch_size for plan in plans)
    shown = Counter(key for plan in plans for key, _ in plan.members)
    for entry in order.samples:
        assert shown[entry.key] >= entry.repeats
    # What was added fills one micro-batch of each bucket at most.
    for kind in set(kind_of.values()):
        added = sum(shown[entry.key] - entry.repeats for entry in order.samples if kind_of[entry.key] == kind)
        assert added < order.micro_batch_size
    assert_occurrences_count_up(plans)


def assert_occurrences_count_up(plans: list[MicroBatchPlan]) -> None:
    """Each sample's occurrences are 0 … n - 1, each once: no two draws of an epoch are for the same place."""
    occurrences: dict[str, list[int]] = {}
    for plan in plans:
        for key, occurrence in plan.members:
            occurrences.setdefault(key, []).append(occurrence)
    for numbers in occurrences.values():
        assert sorted(numbers) == list(range(len(numbers)))


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 5), per_step=st.integers(1, 12))
def test_steps_are_the_epoch_in_pieces_and_the_last_is_completed(order: EpochOrder, epoch: int, per_step: int):
    steps = plans_of_epoch(order, epoch, per_step)
    assert all([plan.index for plan in step] == list(range(per_step)) for step in steps)
    flat = [plan.members for step in steps for plan in step]
    plans = order.micro_batches(epoch)
    assert flat[: len(plans)] == [plan.members for plan in plans]
    assert len(flat) - len(plans) < per_step
    # The start of the epoch once more, as further occurrences.
    for place, members in enumerate(flat[len(plans) :]):
        assert [key for key, _ in members] == [key for key, _ in plans[place % len(plans)].members]
    assert_occurrences_count_up([plan for step in steps for plan in step])


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 5))
def test_the_order_is_a_pure_function(order: EpochOrder, epoch: int):
    """Of the samples (in whatever order they come), the seed and the epoch; not of what was asked before."""
    order.micro_batches(epoch + 1)
    other = EpochOrder(order.samples[::-1], order.micro_batch_size, order.seed)
    assert other.micro_batches(epoch) == order.micro_batches(epoch)


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 3), replicas=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_a_global_batch_does_not_depend_on_replicas(order: EpochOrder, epoch: int, replicas: int, accumulation: int):
    per_step = replicas * accumulation
    whole = [plan.keys for plan in order.global_batch(epoch, 0, per_step)]
    dealt = [order.global_batch(epoch, 0, per_step)[replica::replicas] for replica in range(replicas)]
    assert [len(part) for part in dealt] == [accumulation] * replicas
    assert [dealt[index % replicas][index // replicas].keys for index in range(per_step)] == whole


def test_epochs_and_seeds_have_different_orders():
    samples = [sample(number, BUCKETS[number % 3], 1) for number in range(30)]
    orders = {
        (seed, epoch): tuple(plan.members for plan in EpochOrder(samples, 2, seed).micro_batches(epoch))
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)


def test_an_order_stays_what_it_is():
    """Runs are resumed by later versions: this is the order that they count on."""
    order = EpochOrder([sample(number, BUCKETS[number % 2], 1) for number in range(5)], 2, seed=7)
    numbers = [[key.split("/")[1].split(".")[0] + key[key.index("#") :] for key in plan.keys] for plan in order.micro_batches(0)]
    assert numbers == [["0#0", "4#1"], ["4#0", "2#0"], ["3#0", "1#0"]]


def test_the_report_says_what_is_repeated():
    # 5 + 5 samples and 3 repeats of one: 5 and 8 in micro-batches of 4 are 2 and 2, steps of 3 are 2.
    samples = [sample(number, BUCKETS[number % 2], 4 if number == 1 else 1) for number in range(10)]
    order = EpochOrder(samples, 4, 0)
    assert (order.num_samples, order.num_micro_batches, order.steps_per_epoch(3)) == (13, 4, 2)
    assert order.report(3) == [
        "an epoch: 13 samples (10 different) in 2 steps of 12",
        "  3 samples are shown once more, to fill the last micro-batch of a bucket",
        "  8 samples are shown once more, to fill the last step of the epoch",
    ]
    assert EpochOrder(samples, 1, 0).report(13) == ["an epoch: 13 samples (10 different) in 1 steps of 13"]


def test_evaluation_shows_a_sample_alone():
    assert MicroBatchPlan.single(3, "data/a.png@64x64x1").keys == ["data/a.png@64x64x1#0"]


# ── reading ahead ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize("num_threads", [1, 4])
def test_batches_come_in_order_with_the_samples_values(encoded, num_threads: int):
    cache, samples, encoders = encoded
    order, draw = EpochOrder(samples, 2, 0), Draw(0, 0)
    loader = BatchLoader(cache, samples, encoders, num_threads)
    plans = order.micro_batches(0) * 3
    found = list(loader.prepared(((plan, draw) for plan in plans), prepare))
    assert len(found) == len(plans)
    for plan, micro_batch in zip(plans, found, strict=True):
        rows = [cache.read(next(entry for entry in samples if entry.key == key), encoders) for key, _ in plan.members]
        expected = prepare(Batch(plan.keys, {name: [row[name] for row in rows] for name in rows[0]}), draw)
        assert torch.equal(micro_batch.inputs["mean"], expected.inputs["mean"])
        assert torch.equal(micro_batch.target["lengths"], expected.target["lengths"])


def test_an_endless_plan_is_read_a_few_ahead(encoded):
    cache, samples, encoders = encoded
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield MicroBatchPlan.single(asked, samples[asked % len(samples)].key), Draw(0, 0)

    batches = BatchLoader(cache, samples, encoders, 2).prepared(endless(), prepare)
    for taken in range(1, 20):
        next(batches)
        assert asked <= taken + 4
    before = threading.active_count()
    batches.close()
    assert threading.active_count() < before


def test_what_a_thread_raises_is_raised_in_its_turn(encoded):
    cache, samples, encoders = encoded
    plans = [MicroBatchPlan.single(index, entry.key) for index, entry in enumerate(samples)]

    def failing(batch: Batch, draw: Draw) -> MicroBatch:
        if batch.keys == plans[3].keys:
            raise RuntimeError(f"cannot prepare {batch.keys}")
        return prepare(batch, draw)

    batches = BatchLoader(cache, samples, encoders, 2).prepared(((plan, Draw(0, 0)) for plan in plans), failing)
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(RuntimeError, match="cannot prepare"):
        next(batches)
