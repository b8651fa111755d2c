"""The number of steps against stepping through the data, also when the batch changes on the way."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.utils.data.orders import BUCKETS, RULES, SIZES, orders, sample, shown_in
from utils.checkpoints.checkpoint import Progress
from utils.config.schema import ModelOptions, OptimizerConfig, RunConfig
from utils.data.batches.order import EpochOrder
from utils.data.batches.sizes import BatchSizes
from utils.errors import UserError
from utils.schedule import DataStep, GlobalBatch, Schedule, data_fingerprint, data_step, position


def run_config(accumulation: int, epochs: int | None, max_steps: int | None) -> RunConfig:
    return RunConfig.model_construct(
        gradient_accumulation_steps=accumulation,
        epochs=epochs,
        max_steps=max_steps,
        model=ModelOptions.model_construct(),
        optimizer=OptimizerConfig.model_construct(),
    )


def steps_of_run(order: EpochOrder, per_step: int, epochs: int, progress: Progress | None = None) -> list[DataStep]:
    """As the trainer goes on, from the progress to the end of the last epoch that shows a sample."""
    found, progress = [], progress or Progress()
    while (step := data_step(progress, order, per_step)).epoch < epochs:
        found.append(step)
        progress = step.after
    return found


@given(orders(), st.data())
def test_the_total_is_the_number_of_steps_to_the_last_epoch_and_no_stop_changes_it(order, data):
    epochs, accumulation, replicas = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    epochs += order.next_epoch(0)
    config = run_config(accumulation, epochs, None)
    schedule = Schedule.of(config, order, replicas, Progress())
    progress = Progress()
    for step in steps_of_run(order, schedule.batch.micro_batches, epochs):
        assert Schedule.of(config, order, replicas, position(progress, order)) == schedule
        assert position(progress, order) == progress
        progress = step.after
    assert progress.step == schedule.total_steps
    assert Schedule.of(config, order, replicas, progress).total_steps == progress.step


@given(orders(), st.data())
def test_a_run_shows_its_epochs_and_can_be_continued_from_any_step(order, data):
    """Another number of replicas or workers deals the same micro-batches otherwise; the position tells all that is needed."""
    per_step = data.draw(st.integers(1, 6))
    epochs = order.next_epoch(0) + data.draw(st.integers(1, 3))
    steps = steps_of_run(order, per_step, epochs)
    # Each epoch is its micro-batches in their order, then what completes its last step.
    for epoch in range(epochs):
        plans = [plan for step in steps if step.epoch == epoch for plan in step.plans]
        assert [plan.members for plan in plans][: order.num_micro_batches(epoch)] == [
            plan.members for plan in order.micro_batches(epoch)
        ]
        assert shown_in(plans) >= shown_in(order.micro_batches(epoch))
        assert -(-len(plans) // per_step) == order.num_steps(epoch, per_step)
    # The samples are counted as they are.
    assert all(step.samples == sum(len(plan.members) for plan in step.plans) for step in steps)
    assert [step.after.samples for step in steps] == [sum(each.samples for each in steps[: n + 1]) for n in range(len(steps))]
    at = data.draw(st.integers(0, len(steps)))
    reached = steps[at - 1].after if at else Progress()
    again = EpochOrder(order.samples[::-1], order.sizes, order.seed)
    assert steps_of_run(again, per_step, epochs, position(reached, again)) == steps[at:]


@given(orders(), st.data())
def test_with_another_batch_the_rest_is_counted_anew(order, data):
    """Another micro-batch size too, which gives the epoch another order and perhaps another length."""
    batches = [data.draw(st.tuples(SIZES, st.integers(1, 4), st.integers(1, 3))) for _ in range(2)]
    epochs = order.next_epoch(0) + data.draw(st.integers(1, 3))
    first, second = (EpochOrder(order.samples, sizes, order.seed) for sizes, _, _ in batches)
    total = Schedule.of(run_config(batches[0][1], epochs, None), first, batches[0][2], Progress())
    progress = Progress()
    for _ in range(data.draw(st.integers(0, total.total_steps))):
        progress = data_step(progress, first, total.batch.micro_batches).after
    before, progress = progress, position(progress, second)
    if progress.epoch == before.epoch:
        largest = max(second.batch_sizes.values())
        assert before.epoch_samples - largest < progress.epoch_samples <= before.epoch_samples
    else:
        assert (progress.epoch, progress.epoch_samples) == (before.epoch + 1, 0)
    schedule = Schedule.of(run_config(batches[1][1], epochs, None), second, batches[1][2], progress)
    rest = steps_of_run(second, schedule.batch.micro_batches, epochs, progress)
    assert progress.step + len(rest) == schedule.total_steps


def test_max_steps_counts_all_steps():
    order = EpochOrder([sample(number, BUCKETS[0]) for number in range(10)], 1, 0)
    config = run_config(2, 3, 7)
    assert Schedule.of(config, order, 1, Progress()).total_steps == 7
    assert Schedule.of(config, order, 1, Progress(step=4, epoch=2, epoch_samples=8)).total_steps == 5
    assert Schedule.of(run_config(2, None, 7), order, 1, Progress(step=9, epoch=40)).total_steps == 7


def test_a_place_behind_the_end_of_the_epoch_is_the_next_epoch():
    """As after the data set became smaller."""
    order = EpochOrder([sample(number, BUCKETS[0]) for number in range(10)], 2, 0)
    assert position(Progress(3, 1, 7, 27), order) == Progress(3, 1, 6, 27)
    assert position(Progress(3, 1, 10, 30), order) == Progress(3, 2, 0, 30)
    assert position(Progress(3, 1, 600, 600), order) == Progress(3, 2, 0, 600)


def test_epochs_without_a_sample_are_passed_over():
    """A third of a repeat of one sample: it is shown in the third, the sixth, … epoch."""
    order = EpochOrder([sample(0, BUCKETS[0], Fraction(1, 3))], 1, 0)
    assert Schedule.of(run_config(1, 7, None), order, 1, Progress()).total_steps == 2
    step = data_step(Progress(), order, 1)
    assert (step.epoch, step.after) == (2, Progress(1, 3, 0, 1))
    assert data_step(step.after, order, 1).epoch == 5
    assert Schedule.of(run_config(1, 4, None), order, 1, step.after).total_steps == 1


def test_epochs_that_show_nothing_at_all_are_refused():
    order = EpochOrder([sample(0, BUCKETS[0], Fraction(1, 3))], 1, 0)
    with pytest.raises(UserError, match="epochs = 2: with these num_repeats no epoch before epoch 3 shows a sample; set epochs"):
        Schedule.of(run_config(1, 2, None), order, 1, Progress())
    assert Schedule.of(run_config(1, None, 5), order, 1, Progress()).total_steps == 5


def test_the_global_batch_is_told_with_its_sizes():
    samples = [sample(number, BUCKETS[number % 2]) for number in range(4)]
    settings = {"gradient_accumulation_steps": 3}
    same = GlobalBatch.of(EpochOrder(samples, 2, 0), settings, 2)
    assert (same.samples, same.micro_batches) == (12, 6)
    assert str(same) == "12 samples (micro-batch 2 x accumulation 3 x replicas 2)"
    budget = GlobalBatch.of(EpochOrder(samples, BatchSizes(max_tokens=100, rules=RULES), 0), settings, 2)
    assert budget.samples is None
    assert str(budget) == "6 micro-batches (accumulation 3 x replicas 2) of 2 to 6 samples"


def test_the_fingerprint_tells_data_sets_apart():
    samples = [sample(number, BUCKETS[0]) for number in range(3)]
    kept = (samples, samples[::-1], samples[:2], [*samples[:2], sample(2, BUCKETS[0], 2)])
    one, reversed_, shorter, repeated = (data_fingerprint(EpochOrder(each, 1, 0)) for each in kept)
    assert one == reversed_
    assert len({one, shorter, repeated}) == 3
