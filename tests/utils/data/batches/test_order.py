"""The order of epochs as a pure function, for any data set, repeats, batch sizes and budgets of tokens."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.utils.data.orders import BUCKETS, REPEATS, RULES, orders, sample, shown_in
from utils.data.batches.order import EpochOrder, MicroBatchPlan
from utils.data.batches.sizes import BatchSizes
from utils.data.batches.turns import Turns
from utils.data.values import Bucket


def steps_of_epoch(order: EpochOrder, epoch: int, per_step: int) -> list[list[MicroBatchPlan]]:
    return [order.global_batch(epoch, step * per_step, per_step) for step in range(order.num_steps(epoch, per_step))]


def kinds_of(order: EpochOrder) -> dict[str, tuple[Bucket, int]]:
    return {entry.key: (entry.bucket, len(entry.controls)) for entry in order.samples}


@given(order=orders(), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_sample_as_often_as_stated_and_more_only_to_fill_up(order: EpochOrder, epoch: int):
    plans = order.micro_batches(epoch)
    assert len(plans) == order.num_micro_batches(epoch)
    # Tensors of other shapes, or another number of control pictures, could not be stacked.
    kind_of = kinds_of(order)
    for plan in plans:
        [(bucket, _)] = {kind_of[key] for key, _ in plan.members}
        assert len(plan.members) == order.sizes.of_bucket(bucket)
    shown, added = shown_in(plans), 0
    for kind in set(kind_of.values()):
        members = [entry for entry in order.samples if kind_of[entry.key] == kind]
        stated = 0
        for entry in members:
            least, most = math.floor(entry.repeats), math.ceil(entry.repeats)
            stated += min(most, shown[entry.key])
            assert shown[entry.key] >= least
        # What was added fills one micro-batch of each bucket at most.
        own = sum(shown[entry.key] for entry in members)
        assert own - stated < order.sizes.of_bucket(kind[0])
        added += own
    assert added - order.num_samples(epoch) == order.counts(1, epoch).filled_up
    assert_occurrences_count_up(plans)


def assert_occurrences_count_up(plans: list[MicroBatchPlan]) -> None:
    """Each sample's occurrences are 0 … n - 1, each once: no two draws of an epoch are for the same place."""
    occurrences: dict[str, list[int]] = {}
    for plan in plans:
        for key, occurrence in plan.members:
            occurrences.setdefault(key, []).append(occurrence)
    for numbers in occurrences.values():
        assert sorted(numbers) == list(range(len(numbers)))


@given(number=st.integers(1, 40), repeats=REPEATS, seed=st.integers(0, 9), first=st.integers(0, 30))
def test_repeats_are_kept_to_over_the_epochs(number: int, repeats: Fraction, seed: int, first: int):
    """After any number of epochs each sample was shown as often as stated, to less than one time, and all together exactly."""
    turns = Turns(number, repeats, seed, "turns")
    so_far = [0] * number
    for epoch in range(12):
        times = turns.times(epoch)
        assert sum(times) == turns.total(epoch)
        assert set(times) <= {math.floor(repeats), math.ceil(repeats)}
        so_far = [before + now for before, now in zip(so_far, times, strict=True)]
        stated = (epoch + 1) * repeats
        assert all(abs(shown - stated) < 1 for shown in so_far)
        assert sum(so_far) == math.floor(number * stated)
    assert turns.total(first + turns.period) == turns.total(first)
    found = turns.next_shown(first)
    assert turns.total(found) > 0
    assert not any(turns.total(epoch) for epoch in range(first, found))
    assert Turns(number, repeats, seed, "turns").times(first) == turns.times(first)


@given(order=orders(), epochs=st.integers(1, 8))
def test_without_filling_up_the_epochs_show_each_sample_exactly_as_often_as_stated(order: EpochOrder, epochs: int):
    order = EpochOrder(order.samples, 1, order.seed)
    shown: Counter[str] = Counter()
    for epoch in range(epochs):
        shown += shown_in(order.micro_batches(epoch))
    assert all(abs(shown[entry.key] - epochs * entry.repeats) < 1 for entry in order.samples)
    # Those that are alike, repeats too, are shown exactly so often together.
    alike: dict[tuple, list[str]] = {}
    for entry in order.samples:
        alike.setdefault((entry.bucket, len(entry.controls), entry.repeats), []).append(entry.key)
    for (*_, repeats), keys in alike.items():
        assert sum(shown[key] for key in keys) == math.floor(epochs * repeats * len(keys))


def test_half_a_repeat_shows_one_half_and_then_the_other():
    order = EpochOrder([sample(number, BUCKETS[0], Fraction(1, 2)) for number in range(10)], 1, 0)
    one, other, again = (set(shown_in(order.micro_batches(epoch))) for epoch in range(3))
    assert len(one) == len(other) == 5
    assert one | other == {entry.key for entry in order.samples}
    assert again == one
    # Which half is first depends on the seed.
    assert set(shown_in(EpochOrder(order.samples, 1, 1).micro_batches(0))) not in (one, other)


def test_a_directory_with_a_fraction_does_not_move_another():
    """One and a half of five, and two of three others in the same bucket: 7 or 8 and 6."""
    few = [sample(number, BUCKETS[0], Fraction(3, 2)) for number in range(5)]
    twice = [sample(number, BUCKETS[0], 2) for number in range(5, 8)]
    order = EpochOrder(few + twice, 1, 0)
    assert [order.num_samples(epoch) for epoch in range(4)] == [13, 14, 13, 14]
    for epoch in range(4):
        shown = shown_in(order.micro_batches(epoch))
        assert all(shown[entry.key] == 2 for entry in twice)
        assert {shown[entry.key] for entry in few} == {1, 2}


def test_an_epoch_may_be_empty():
    order = EpochOrder([sample(0, BUCKETS[0], Fraction(1, 3))], 2, 0)
    assert [order.num_micro_batches(epoch) for epoch in range(7)] == [0, 0, 1, 0, 0, 1, 0]
    assert [order.next_epoch(epoch) for epoch in range(4)] == [2, 2, 2, 5]
    assert order.micro_batches(0) == []
    assert shown_in(order.micro_batches(2)) == {order.samples[0].key: 2}
    rare = EpochOrder([sample(0, BUCKETS[0], Fraction("1e-9"))], 2, 0)
    assert rare.next_epoch(0) == 10**9 - 1


@given(order=orders(), epoch=st.integers(0, 5), per_step=st.integers(1, 12))
def test_steps_are_the_epoch_in_pieces_and_the_last_is_completed(order: EpochOrder, epoch: int, per_step: int):
    steps = steps_of_epoch(order, epoch, per_step)
    assert all([plan.index for plan in step] == list(range(per_step)) for step in steps)
    flat = [plan.members for step in steps for plan in step]
    plans = order.micro_batches(epoch)
    assert flat[: len(plans)] == [plan.members for plan in plans]
    assert len(flat) - len(plans) < per_step
    # The start of the epoch once more, as further occurrences.
    for place, members in enumerate(flat[len(plans) :]):
        assert [key for key, _ in members] == [key for key, _ in plans[place % len(plans)].members]
    assert_occurrences_count_up([plan for step in steps for plan in step])
    counts = order.counts(per_step, epoch)
    assert counts.steps == len(steps)
    assert counts.shown + counts.filled_up + counts.filled_up_step == sum(map(len, flat))


@given(order=orders(), per_step=st.integers(1, 5), first=st.integers(0, 40), number=st.integers(0, 40))
def test_the_steps_of_many_epochs_are_the_sum_of_theirs(order: EpochOrder, per_step: int, first: int, number: int):
    expected = sum(order.num_steps(epoch, per_step) for epoch in range(first, first + number))
    assert order.total_steps(first, first + number, per_step) == expected


@given(order=orders(), epoch=st.integers(0, 5))
def test_the_order_is_a_pure_function(order: EpochOrder, epoch: int):
    """Of the samples (in whatever order they come), the seed and the epoch; not of what was asked before."""
    for before in (epoch + 1, epoch + 9, 0):
        order.micro_batches(before)
    other = EpochOrder(order.samples[::-1], order.sizes, order.seed)
    assert other.micro_batches(epoch) == order.micro_batches(epoch)


@given(order=orders(), epoch=st.integers(0, 3), replicas=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_a_global_batch_does_not_depend_on_replicas(order: EpochOrder, epoch: int, replicas: int, accumulation: int):
    epoch, per_step = order.next_epoch(epoch), replicas * accumulation
    whole = [plan.keys for plan in order.global_batch(epoch, 0, per_step)]
    dealt = [order.global_batch(epoch, 0, per_step)[replica::replicas] for replica in range(replicas)]
    assert [len(part) for part in dealt] == [accumulation] * replicas
    assert [dealt[index % replicas][index // replicas].keys for index in range(per_step)] == whole


@given(order=orders(), epoch=st.integers(0, 3), data=st.data())
def test_a_micro_batch_is_found_by_the_samples_before_it(order: EpochOrder, epoch: int, data: st.DataObject):
    plans = order.micro_batches(epoch)
    before = 0
    for index, plan in enumerate(plans):
        assert order.samples_before(epoch, index) == before
        assert order.micro_batch_at(epoch, before + data.draw(st.integers(0, len(plan.members) - 1))) == index
        before += len(plan.members)
    assert order.micro_batch_at(epoch, before) == len(plans)


def test_epochs_and_seeds_have_different_orders():
    samples = [sample(number, BUCKETS[number % 3]) for number in range(30)]
    found = {
        (seed, epoch): tuple(plan.members for plan in EpochOrder(samples, 2, seed).micro_batches(epoch))
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(set(found.values())) == len(found)


def numbers_of(order: EpochOrder, epoch: int) -> list[list[str]]:
    """The samples' numbers with their occurrences."""
    plans = order.micro_batches(epoch)
    return [[key.split("/")[1].split(".")[0] + key[key.index("#") :] for key in plan.keys] for plan in plans]


def test_an_order_stays_what_it_is():
    """Runs are resumed by later versions: these are the orders that they count on."""
    order = EpochOrder([sample(number, BUCKETS[number % 2]) for number in range(5)], 2, seed=7)
    assert numbers_of(order, 0) == [["0#0", "4#1"], ["4#0", "2#0"], ["3#0", "1#0"]]
    order = EpochOrder([sample(number, BUCKETS[number % 2], Fraction(1, 2)) for number in range(9)], BatchSizes(1, 2), seed=7)
    assert numbers_of(order, 0) == [["3#0"], ["6#0", "4#0"], ["1#0"]]
    assert numbers_of(order, 1) == [["5#0"], ["2#0", "0#0"], ["7#0"], ["8#0", "2#1"]]


def test_the_size_of_a_micro_batch_may_depend_on_its_bucket():
    assert [BatchSizes(2).of_bucket(bucket) for bucket in BUCKETS] == [2, 2, 2]
    assert [BatchSizes(2, 6).of_bucket(bucket) for bucket in BUCKETS] == [6, 2, 2]
    # A budget of 100 tokens has room for 6 x 16, 2 x 48, 1 x 54.
    assert [RULES.tokens(bucket) for bucket in BUCKETS] == [16, 48, 54]
    sizes = BatchSizes(max_tokens=100, rules=RULES)
    assert [sizes.of_bucket(bucket) for bucket in BUCKETS] == [6, 2, 1]
    assert [sizes.problem(bucket) for bucket in BUCKETS] == [None] * 3
    tight = BatchSizes(max_tokens=50, rules=RULES)
    assert [tight.of_bucket(bucket) for bucket in BUCKETS] == [3, 1, 1]
    assert EpochOrder([sample(number, bucket) for number, bucket in enumerate(BUCKETS)], tight, 0).warnings() == [
        "a sample of 96x48x9 has 54 tokens, more than max_tokens_per_micro_batch = 50: its micro-batches have one sample each, "
        "and need the memory of so many tokens"
    ]
    settings = {"micro_batch_size_per_gpu": 2, "image_micro_batch_size_per_gpu": 6}
    assert BatchSizes.of(settings, RULES) == BatchSizes(2, 6, None, RULES)


def test_the_report_says_what_is_repeated():
    # 5 + 5 samples and 3 repeats of one: 5 and 8 in micro-batches of 4 are 2 and 2, steps of 3 are 2.
    samples = [sample(number, BUCKETS[number % 2], 4 if number == 1 else 1) for number in range(10)]
    order = EpochOrder(samples, 4, 0)
    assert (order.num_samples(0), order.num_micro_batches(0), order.num_steps(0, 3)) == (13, 4, 2)
    assert order.report(3) == [
        "an epoch: 13 samples (10 different) in 2 steps of 12",
        "  64x64x1: 5 samples, shown 5 times in 2 micro-batches of 4, 3 of them once more",
        "  64x64x9: 5 samples, shown 8 times in 2 micro-batches of 4",
        "  3 samples are shown once more, to fill the last micro-batch of a bucket",
        "  8 samples are shown once more, to fill the last step of the epoch",
    ]
    assert EpochOrder(samples, 1, 0).report(13) == [
        "an epoch: 13 samples (10 different) in 1 step of 13",
        "  64x64x1: 5 samples, shown 5 times in 5 micro-batches of 1",
        "  64x64x9: 5 samples, shown 8 times in 8 micro-batches of 1",
    ]


def test_the_report_of_buckets_and_epochs_that_differ():
    """Seven pictures by six, five clips, each in two epochs of three."""
    samples = [sample(number, BUCKETS[number >= 7], Fraction(2, 3)) for number in range(12)]
    order = EpochOrder(samples, BatchSizes(1, 3, rules=RULES), 0)
    counts = order.counts(4)
    found = [(c.bucket, c.samples, c.shown, c.batch_size, c.micro_batches, c.filled_up) for c in counts.buckets]
    assert found == [(BUCKETS[0], 7, 4, 3, 2, 2), (BUCKETS[1], 5, 3, 1, 3, 0)]
    extra = sum(len(plan.members) for plan in order.micro_batches(0)[:3])
    assert order.report(4) == [
        "epoch 1: 7 samples (12 different) in 2 steps of 4 micro-batches, of 1 to 3 samples; 8 samples an epoch on average",
        "  64x64x1: 7 samples of 16 tokens, shown 4 times in 2 micro-batches of 3, 2 of them once more",
        "  64x64x9: 5 samples of 48 tokens, shown 3 times in 3 micro-batches of 1",
        "  2 samples are shown once more, to fill the last micro-batch of a bucket",
        f"  {extra} samples are shown once more, to fill the last step of the epoch",
    ]


def test_evaluation_shows_a_sample_alone():
    assert MicroBatchPlan.single(3, "data/a.png@64x64x1").keys == ["data/a.png@64x64x1#0"]


def test_only_the_epochs_that_are_asked_for_are_put_in_order(monkeypatch: pytest.MonkeyPatch):
    order = EpochOrder([sample(number, BUCKETS[number % 3], Fraction(7, 3)) for number in range(30)], 2, 0)
    ordered: Counter[int] = Counter()
    as_usual = order._ordered

    def counted(epoch: int):
        ordered[epoch] += 1
        return as_usual(epoch)

    monkeypatch.setattr(order, "_ordered", counted)
    order.total_steps(0, 1000, 4), order.next_epoch(500), order.counts(1, 77)
    assert not ordered
    # One epoch is trained while the next is read ahead.
    for epoch in (5, 6, 5, 6, 7, 6, 7):
        order.micro_batches(epoch)
    assert ordered == {5: 1, 6: 1, 7: 1}
