"""How long a run is, and where in its data it stands: whole numbers, from the config and the order of the data."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from utils.checkpoints.checkpoint import Progress
from utils.config.schema import RunConfig
from utils.data.batches.order import EpochOrder, MicroBatchPlan
from utils.errors import UserError


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step consumes."""

    micro_batch_sizes: tuple[int, ...]
    """Numbers of samples that a micro-batch may have, the smallest first: one, unless buckets differ."""
    accumulation: int
    replicas: int

    @classmethod
    def of(cls, order: EpochOrder, settings: Mapping[str, Any], replicas: int) -> "GlobalBatch":
        """``settings``: those of the main file, by name."""
        return cls(tuple(sorted(set(order.batch_sizes.values()))), settings["gradient_accumulation_steps"], replicas)

    @property
    def micro_batches(self) -> int:
        return self.accumulation * self.replicas

    @property
    def samples(self) -> int | None:
        """None: it depends on the buckets that a step meets."""
        return self.micro_batch_sizes[0] * self.micro_batches if len(self.micro_batch_sizes) == 1 else None

    @property
    def micro_batch(self) -> str:
        """``2``, or ``1 to 8``."""
        return " to ".join(map(str, dict.fromkeys((self.micro_batch_sizes[0], self.micro_batch_sizes[-1]))))

    def __str__(self) -> str:
        if self.samples is None:
            return (
                f"{self.micro_batches} micro-batches (accumulation {self.accumulation} x replicas {self.replicas}) "
                f"of {self.micro_batch} samples"
            )
        factors = f"micro-batch {self.micro_batch} x accumulation {self.accumulation} x replicas {self.replicas}"
        return f"{self.samples} samples ({factors})"


@dataclass(frozen=True)
class Schedule:
    """How long the run is, in optimizer steps."""

    batch: GlobalBatch
    steps_per_epoch: int
    """Of the first epoch that shows a sample.  Where repeats are fractions, others may have a few more or less."""
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig, order: EpochOrder, replicas: int, progress: Progress) -> "Schedule":
        """From ``progress`` on, which has come about with whatever batches; ``max_steps`` counts its steps too.

        Raises UserError if the epochs of a new run show no sample.
        """
        batch = GlobalBatch.of(order, dict(config), replicas)
        limits = [config.max_steps] if config.max_steps else []
        if config.epochs:
            limits.append(progress.step + _rest_of_run(order, progress, config.epochs, batch.micro_batches))
        first = order.next_epoch(0)
        if config.epochs and progress == Progress() and limits[-1] == 0:
            raise UserError(
                f"epochs = {config.epochs}: with these num_repeats no epoch before epoch {first + 1} shows a sample; "
                f"set epochs to {first + 1} or more, or raise num_repeats"
            )
        return cls(batch, order.num_steps(first, batch.micro_batches), min(limits))


def _rest_of_run(order: EpochOrder, progress: Progress, epochs: int, per_step: int) -> int:
    """Steps from the progress to the end of so many epochs."""
    if progress.epoch >= epochs:
        return 0
    done = order.micro_batch_at(progress.epoch, progress.epoch_samples)
    rest = order.num_micro_batches(progress.epoch) - done
    return -(-rest // per_step) + order.total_steps(progress.epoch + 1, epochs, per_step)


def position(progress: Progress, order: EpochOrder) -> Progress:
    """The progress at a place where the epoch, in the order that it now has, can go on: at a whole micro-batch, before its end."""
    if progress.epoch_samples == 0:
        return progress
    first = order.micro_batch_at(progress.epoch, progress.epoch_samples)
    if first >= order.num_micro_batches(progress.epoch):
        return replace(progress, epoch=progress.epoch + 1, epoch_samples=0)
    return replace(progress, epoch_samples=order.samples_before(progress.epoch, first))


@dataclass(frozen=True)
class DataStep:
    """The data of one optimizer step."""

    plans: list[MicroBatchPlan]
    """The global batch; replica r of n takes those at ``[r::n]``."""
    epoch: int
    samples: int
    """Those that complete the step included."""
    after: Progress


def data_step(progress: Progress, order: EpochOrder, micro_batches_per_step: int) -> DataStep:
    """The step that begins at a :func:`position`.  Epochs that show no sample are passed over."""
    if progress.epoch_samples == 0:
        progress = replace(progress, epoch=order.next_epoch(progress.epoch))
    epoch = progress.epoch
    first = order.micro_batch_at(epoch, progress.epoch_samples)
    plans = order.global_batch(epoch, first, micro_batches_per_step)
    samples = sum(len(plan.members) for plan in plans)
    ends = first + micro_batches_per_step >= order.num_micro_batches(epoch)
    return DataStep(plans, epoch, samples, progress.after_step(samples, epoch_is_over=ends))


def data_fingerprint(order: EpochOrder) -> str:
    """Hash of the samples in their order: the same position means the same sample only if this is the same."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in order.samples:
        digest.update(f"{sample.key}\x1f{sample.repeats}\x1e".encode())
    return digest.hexdigest()
