"""The training loop: steps, evaluation, and when to save what."""

import hashlib
import itertools
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.checkpoints.manager import Checkpoint, CheckpointManager, Progress
from utils.checkpoints.run_exports import RunExporter
from utils.config.schema import RunConfig
from utils.data.batches import BatchLoader, EpochOrder, MicroBatchPlan
from utils.data.values import Batch, MicroBatch, Sample
from utils.draw import Draw
from utils.errors import UserError
from utils.metrics import MetricLog
from utils.optim.optimizers import RunOptimizer
from utils.optim.schedules import learning_rate_factor
from utils.pipeline.engine import StageEngine, StepResult
from utils.topology import Topology

log = logging.getLogger(__name__)

# So many refused steps in a row are no accident of single samples any more.
MAX_REFUSED_STEPS = 20
# Evaluation has an epoch of its own, so that its noise is the same whenever it is run.
EVALUATION_EPOCH = -1


@dataclass(frozen=True)
class EvalData:
    """One held-out dataset, encoded."""

    samples: list[Sample]
    loader: BatchLoader


@dataclass(frozen=True)
class Schedule:
    """How long the run is, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig, order: EpochOrder, replicas: int) -> "Schedule":
        steps = order.steps_per_epoch(replicas * config.gradient_accumulation_steps)
        limits = [limit for limit in (config.max_steps, config.epochs and config.epochs * steps) if limit]
        return cls(steps_per_epoch=steps, total_steps=min(limits))


class Trainer:
    """Runs the steps from ``progress`` to the end and keeps the promises of the config on the way.  All methods are collective."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        *,
        engine: StageEngine,
        optimizer: RunOptimizer,
        parameters: Mapping[str, nn.Parameter],
        order: EpochOrder,
        loader: BatchLoader,
        eval_data: Mapping[str, EvalData],
        prepare: Callable[[Batch, Draw], MicroBatch],
        checkpoints: CheckpointManager,
        exporter: RunExporter,
        metrics: MetricLog,
        record: Mapping[str, Any],
        checkpoint: Checkpoint | None = None,
    ):
        self.config, self.topology, self.engine, self.optimizer = config, topology, engine, optimizer
        self.parameters, self.order, self.loader, self.eval_data, self.prepare = parameters, order, loader, eval_data, prepare
        self.checkpoints, self.exporter, self.metrics = checkpoints, exporter, metrics
        self.record = {**record, "seed": config.seed, "data": data_fingerprint(order)}
        self.micro_batches_per_step = topology.replicas * config.gradient_accumulation_steps
        self.samples_per_step = self.micro_batches_per_step * config.micro_batch_size_per_gpu
        self.schedule = Schedule.of(config, order, topology.replicas)
        self.progress = Progress()
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Optimizer state and position.  The weights were filled in when the layers were made."""
        self.optimizer.load_state(*checkpoint.optimizer(self.parameters))
        self.progress = checkpoint.progress
        before, now = _flat(checkpoint.record), _flat(self.record)
        for key in [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            log.warning("changed since the checkpoint: %s was %r, is %r", key, before.get(key), now.get(key))
        if before.get("data") != now["data"]:
            log.warning("the data set is not the one of the checkpoint: the rest of the epoch has another order")
        log.info("continuing from step %d (epoch %d) of %s", self.progress.step, self.progress.epoch + 1, checkpoint.folder.name)

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> Progress:
        """Train to the end of the schedule; returns the final progress."""
        if self.progress.step >= self.schedule.total_steps:
            log.info("the run is finished: %d of %d steps are done", self.progress.step, self.schedule.total_steps)
            return self.progress
        if self.config.eval_before_first_step and self.progress.step == 0:
            self.evaluate()
        batches = self._training_batches()
        self._last_checkpoint_time = time.monotonic()
        refused = 0
        while self.progress.step < self.schedule.total_steps:
            result = self._step(batches)
            refused = 0 if result.applied else refused + 1
            if refused == MAX_REFUSED_STEPS:
                error = UserError(
                    f"the loss or the gradient was not finite in {refused} steps in a row, up to step {self.progress.step}; "
                    "no weight was changed by them, and metrics.jsonl names their samples. Try a lower optimizer.lr"
                )
                error.everywhere = True
                raise error
            self._save_and_evaluate()
        return self.progress

    def _step(self, batches: Iterator[MicroBatch]) -> StepResult:
        started = time.perf_counter()
        step = self.progress.step
        factor = learning_rate_factor(
            step,
            schedule=self.config.lr_scheduler,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.schedule.total_steps,
        )
        lr = self.optimizer.set_lr(factor)
        result = self.engine.train_step(step, batches)
        seconds = time.perf_counter() - started
        keys = [key for plan in self._plans_at(self.progress) for key in plan.keys] if not result.applied else []
        samples = self.samples_per_step
        self.progress = self.progress.after_step(samples, epoch_is_over=self._epoch_ends(self.progress))
        values = {
            "step": self.progress.step,
            "epoch": self.progress.epochs_begun,
            "samples": self.progress.samples,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "stage_memory_gb": self._stage_memory(),
        }
        self.metrics.step(values)
        if not result.applied:
            log.error(
                "step %d was refused: loss %s, gradient norm %s; its samples: %s", step + 1, result.loss, result.grad_norm, keys
            )
            self.metrics.event("refused_step", {"step": self.progress.step, "samples": keys})
        return result

    def _save_and_evaluate(self) -> None:
        config, step = self.config, self.progress.step
        last = step == self.schedule.total_steps
        epoch = self.progress.epoch if self.progress.epoch_samples == 0 else None

        def due(every_steps: int | None, every_epochs: int | None) -> bool:
            by_steps = every_steps is not None and step % every_steps == 0
            return by_steps or (every_epochs is not None and epoch is not None and epoch % every_epochs == 0)

        if due(config.eval_every_n_steps, config.eval_every_n_epochs):
            self.evaluate()
        if last or due(config.checkpoint_every_n_steps, config.checkpoint_every_n_epochs) or self._minutes_are_over():
            self.save_checkpoint()
        if last or due(config.save_every_n_steps, config.save_every_n_epochs):
            by_epoch = config.save_every_n_steps is None and config.save_every_n_epochs is not None and epoch is not None
            self.export(f"epoch-{epoch:04d}" if by_epoch else f"step-{step:08d}")

    def _minutes_are_over(self) -> bool:
        minutes = self.config.checkpoint_every_n_minutes
        if minutes is None:
            return False
        # Clocks differ between ranks: rank 0's decides.
        return self.topology.broadcast(time.monotonic() - self._last_checkpoint_time >= 60 * minutes)

    # ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _first_micro_batch(self, progress: Progress) -> int:
        return progress.epoch_samples // self.config.micro_batch_size_per_gpu

    def _epoch_ends(self, progress: Progress) -> bool:
        return self._first_micro_batch(progress) + self.micro_batches_per_step >= self.order.num_micro_batches

    def _plans_at(self, progress: Progress) -> list[MicroBatchPlan]:
        """The global batch of the step that begins at this progress."""
        return self.order.global_batch(progress.epoch, self._first_micro_batch(progress), self.micro_batches_per_step)

    def _training_batches(self) -> Iterator[MicroBatch]:
        """This replica's micro-batches from here to the end, read and prepared ahead of the steps by the loader's threads."""
        topology = self.topology
        if 0 < topology.stage < topology.stages - 1:
            return iter(())  # stages in the middle get everything from their neighbours

        def work() -> Iterator[tuple[MicroBatchPlan, Draw]]:
            progress = self.progress
            while progress.step < self.schedule.total_steps:
                for plan in self._plans_at(progress)[topology.replica :: topology.replicas]:
                    yield plan, Draw(self.config.seed, progress.epoch)
                progress = progress.after_step(self.samples_per_step, epoch_is_over=self._epoch_ends(progress))

        return self.loader.prepared(work(), self.prepare)

    # ── evaluation ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(self) -> None:
        """Held-out loss: every sample with its fixed noise, at fixed quantiles of the timestep distribution."""
        for name, data in self.eval_data.items():
            with self.optimizer.evaluation():
                losses = {place: self._eval_loss(data, place) for place in self.config.eval_timesteps}
            values: dict[str, Any] = {f"loss_at_{place:g}": loss for place, loss in losses.items()}
            mean = sum(losses.values()) / len(losses)
            log.info("eval %s: loss %.5f at step %d", name, mean, self.progress.step)
            self.metrics.event("eval", {"step": self.progress.step, "dataset": name, "loss": mean, **values})

    def _eval_loss(self, data: EvalData, place: float) -> float:
        topology = self.topology
        # One sample each, so that sizes need not fit; replicas that have one less repeat their last, which is not counted.
        plans = [MicroBatchPlan.single(index, sample.key) for index, sample in enumerate(data.samples)]
        mine = plans[topology.replica :: topology.replicas]
        count = -(-len(plans) // topology.replicas)
        padded = mine + (mine or plans)[-1:] * (count - len(mine))
        draw = Draw(self.config.seed, EVALUATION_EPOCH, fixed_time=place)
        reads = topology.stage in (0, topology.stages - 1)
        batches = data.loader.prepared(((plan, draw) for plan in padded), self.prepare) if reads else iter(())
        losses = self.engine.evaluate(batches, count)
        counted = losses[: len(mine)] if losses is not None else []
        everywhere = list(itertools.chain.from_iterable(topology.gather(counted)))
        return sum(sorted(everywhere)) / len(everywhere)

    # ── saving ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(self) -> None:
        weights = {name: parameter.data for name, parameter in self.parameters.items()}
        path = self.checkpoints.save(self.progress, weights, *self.optimizer.state(), self.record)
        self._last_checkpoint_time = time.monotonic()
        self.metrics.event("checkpoint", {"step": self.progress.step, "name": path.name if path else None})
        if path:
            log.info("checkpoint %s", path.name)

    def export(self, name: str) -> None:
        with self.optimizer.evaluation():
            weights = {name: parameter.data for name, parameter in self.parameters.items()}
            training = {"step": self.progress.step, "epoch": self.progress.epochs_begun, "samples": self.progress.samples}
            path = self.exporter.export(name, weights, training)
        self.metrics.event("export", {"step": self.progress.step, "name": path.name if path else None})

    def _stage_memory(self) -> list[float]:
        """Peak memory of each rank so far, in GB: the GPU's, or without one the process's."""
        if self.topology.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.topology.device) / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return [round(value, 3) for value in self.topology.gather(peak)]


def data_fingerprint(order: EpochOrder) -> str:
    """Hash of the samples in their order: the same position means the same sample only if this is the same."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in order.samples:
        digest.update(f"{sample.key}\x1f{sample.num_repeats}\x1e".encode())
    return digest.hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
