"""How long a run is, and where in its data it stands: whole numbers, from the config and the order of the data."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from utils.checkpoints.checkpoint import Progress
from utils.config.schema import RunConfig
from utils.data.batches import EpochOrder


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step consumes."""

    micro_batch_size: int
    accumulation: int
    replicas: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], replicas: int) -> "GlobalBatch":
        """``settings``: those of the main file, by name."""
        return cls(settings["micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"], replicas)

    @property
    def micro_batches(self) -> int:
        return self.accumulation * self.replicas

    @property
    def samples(self) -> int:
        return self.micro_batch_size * self.micro_batches

    def __str__(self) -> str:
        factors = f"micro-batch {self.micro_batch_size} x accumulation {self.accumulation} x replicas {self.replicas}"
        return f"{self.samples} samples ({factors})"


@dataclass(frozen=True)
class Schedule:
    """How long the run is, in optimizer steps."""

    batch: GlobalBatch
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig, order: EpochOrder, replicas: int, progress: Progress) -> "Schedule":
        """From ``progress`` on, which has come about with whatever batches; ``max_steps`` counts its steps too."""
        batch = GlobalBatch(config.micro_batch_size_per_gpu, config.gradient_accumulation_steps, replicas)
        steps = order.steps_per_epoch(batch.micro_batches)
        limits = [config.max_steps] if config.max_steps else []
        if config.epochs and progress.epoch >= config.epochs:
            limits.append(progress.step)
        elif config.epochs:
            rest = order.num_micro_batches - progress.epoch_samples // batch.micro_batch_size
            limits.append(progress.step + -(-rest // batch.micro_batches) + (config.epochs - progress.epoch - 1) * steps)
        return cls(batch, steps, min(limits))


def position(progress: Progress, order: EpochOrder) -> Progress:
    """The progress at a place where the epoch, in the order that it now has, can go on: at a whole micro-batch, before its end."""
    first = progress.epoch_samples // order.micro_batch_size
    if first >= order.num_micro_batches:
        return replace(progress, epoch=progress.epoch + 1, epoch_samples=0)
    return replace(progress, epoch_samples=first * order.micro_batch_size)


def data_fingerprint(order: EpochOrder) -> str:
    """Hash of the samples in their order: the same position means the same sample only if this is the same."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in order.samples:
        digest.update(f"{sample.key}\x1f{sample.repeats}\x1e".encode())
    return digest.hexdigest()
