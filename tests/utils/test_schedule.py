"""The number of steps against stepping through the data, also when the batch changes on the way."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.data.test_batches import BUCKETS, orders, sample
from utils.checkpoints.checkpoint import Progress
from utils.config.schema import ModelOptions, OptimizerConfig, RunConfig
from utils.data.batches import EpochOrder
from utils.schedule import GlobalBatch, Schedule, data_fingerprint, position


def run_config(order: EpochOrder, accumulation: int, epochs: int | None, max_steps: int | None) -> RunConfig:
    return RunConfig.model_construct(
        micro_batch_size_per_gpu=order.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        epochs=epochs,
        max_steps=max_steps,
        model=ModelOptions.model_construct(),
        optimizer=OptimizerConfig.model_construct(),
    )


def after_one_step(progress: Progress, order: EpochOrder, batch: GlobalBatch) -> Progress:
    """As the trainer goes on."""
    first = progress.epoch_samples // order.micro_batch_size
    assert order.global_batch(progress.epoch, first, batch.micro_batches)
    return progress.after_step(batch.samples, epoch_is_over=first + batch.micro_batches >= order.num_micro_batches)


@settings(deadline=None)
@given(orders(), st.data())
def test_the_total_is_the_number_of_steps_to_the_last_epoch_and_no_stop_changes_it(order, data):
    epochs, accumulation, replicas = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    config = run_config(order, accumulation, epochs, None)
    schedule = Schedule.of(config, order, replicas, Progress())
    assert schedule.total_steps == epochs * schedule.steps_per_epoch
    progress = Progress()
    while progress.epoch < epochs:
        assert Schedule.of(config, order, replicas, position(progress, order)) == schedule
        assert position(progress, order) == progress
        progress = after_one_step(progress, order, schedule.batch)
    assert progress.step == schedule.total_steps
    assert Schedule.of(config, order, replicas, progress).total_steps == progress.step


@settings(deadline=None)
@given(orders(), st.data())
def test_with_another_batch_the_rest_is_counted_anew(order, data):
    """Another micro-batch size too, which gives the epoch another order and perhaps another length."""
    batches = [data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))) for _ in range(2)]
    epochs = data.draw(st.integers(1, 3))
    first, second = (EpochOrder(order.samples, size, order.seed) for size, _, _ in batches)
    progress, total = Progress(), Schedule.of(run_config(first, batches[0][1], epochs, None), first, batches[0][2], Progress())
    for _ in range(data.draw(st.integers(0, total.total_steps))):
        progress = after_one_step(progress, first, total.batch)
    progress = position(progress, second)
    schedule = Schedule.of(run_config(second, batches[1][1], epochs, None), second, batches[1][2], progress)
    while progress.epoch < epochs:
        progress = after_one_step(progress, second, schedule.batch)
    assert progress.step == schedule.total_steps


def test_max_steps_counts_all_steps():
    order = EpochOrder([sample(number, BUCKETS[0], 1) for number in range(10)], 1, 0)
    config = run_config(order, 2, 3, 7)
    assert Schedule.of(config, order, 1, Progress()).total_steps == 7
    assert Schedule.of(config, order, 1, Progress(step=4, epoch=2, epoch_samples=8)).total_steps == 5
    assert Schedule.of(run_config(order, 2, None, 7), order, 1, Progress(step=9, epoch=40)).total_steps == 7


def test_a_place_behind_the_end_of_the_epoch_is_the_next_epoch():
    """As after the data set became smaller."""
    order = EpochOrder([sample(number, BUCKETS[0], 1) for number in range(10)], 2, 0)
    assert position(Progress(3, 1, 7, 27), order) == Progress(3, 1, 6, 27)
    assert position(Progress(3, 1, 10, 30), order) == Progress(3, 2, 0, 30)
    assert position(Progress(3, 1, 600, 600), order) == Progress(3, 2, 0, 600)


def test_the_fingerprint_tells_data_sets_apart():
    samples = [sample(number, BUCKETS[0], 1) for number in range(3)]
    orders = [EpochOrder(kept, 1, 0) for kept in (samples, samples[::-1], samples[:2], [*samples[:2], sample(2, BUCKETS[0], 2)])]
    one, reversed_, shorter, repeated = map(data_fingerprint, orders)
    assert one == reversed_
    assert len({one, shorter, repeated}) == 3
