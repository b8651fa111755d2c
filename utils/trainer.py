"""The training loop: steps, evaluation, and when to save what."""

import itertools
import logging
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from utils.bad_steps import BadSteps
from utils.checkpoints.checkpoint import Checkpoint, Progress
from utils.config.schema import RunConfig
from utils.data.batches import BatchLoader, Timed
from utils.data.order import EpochOrder, MicroBatchPlan
from utils.data.values import Sample
from utils.draw import Draw
from utils.metrics import MetricLog
from utils.optim.rates import LearningRates
from utils.optim.schedules import learning_rate_factor
from utils.pipeline.engine import StageEngine
from utils.resume import report_resume
from utils.saving import RunSaver
from utils.schedule import DataStep, Schedule, data_fingerprint, data_step
from utils.stopping import DONE, RUN_AGAIN, Stopped, Stopper, Wishes
from utils.topology import Topology
from utils.trained import Trained
from utils.watchdog import Watchdog

log = logging.getLogger(__name__)

# So many samples of refused steps are named in the error that ends the run; the others are in the log.
NAMED_SAMPLES = 12
# Evaluation has an epoch of its own, so that its noise is the same whenever it is run.
EVALUATION_EPOCH = -1
# Held-out micro-batches between two looks at whether to stop, for each stage: the pipeline runs empty there.
EVAL_CHUNK = 8
# What writing a checkpoint is thought to do before one was measured.
UNMEASURED_BYTES_PER_SECOND = 2e8


@dataclass(frozen=True)
class EvalData:
    """One held-out dataset, encoded."""

    samples: list[Sample]
    loader: BatchLoader


class Trainer:
    """Runs the steps from ``progress`` to the end and keeps the promises of the config on the way.  All methods are collective."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        *,
        engine: StageEngine,
        trained: Trained,
        rates: LearningRates,
        order: EpochOrder,
        loader: BatchLoader,
        eval_data: Mapping[str, EvalData],
        saver: RunSaver,
        metrics: MetricLog,
        stopper: Stopper,
        watch: Watchdog,
        record: Mapping[str, Any],
        progress: Progress,
        checkpoint: Checkpoint | None,
    ):
        self.config, self.topology, self.engine, self.trained, self.rates = config, topology, engine, trained, rates
        self.order, self.loader, self.eval_data = order, loader, eval_data
        self.saver, self.metrics, self.stopper, self.watch = saver, metrics, stopper, watch
        self.agreed = Wishes()
        """What the ranks asked for at their last exchange."""
        self.record = {**record, "seed": config.seed, "data": data_fingerprint(order)}
        self.progress, self.schedule = progress, Schedule.of(config, order, topology.replicas, progress)
        self.bad_steps = BadSteps(config.max_bad_steps)
        self._last_checkpoint_time = time.monotonic()
        self._evaluated_at: int | None = None
        self._eval_losses: dict[str, float] = {}
        if checkpoint is not None:
            self.saver.checkpoints.resumed_from(checkpoint)
            if topology.is_main:
                report_resume(checkpoint, self.record, progress, order, self.schedule, rates.default * self._lr_factor())

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> Progress:
        """Train to the end of the schedule; returns the final progress.  Raises Stopped if the ranks agreed to end before."""
        if self.progress.unfinished:
            log.info("the run was stopped before this was done: %s", ", ".join(self.progress.unfinished))
            self._finish_step()
        if self.progress.step >= self.schedule.total_steps:
            log.info("the run is finished: %d of %d steps are done", self.progress.step, self.schedule.total_steps)
            return self.progress
        if self.config.eval_before_first_step and self.progress.step == 0 and not self.evaluate():
            self._stop()  # there is nothing to save yet
        batches = self._training_batches()
        while self.progress.step < self.schedule.total_steps:
            with self.watch.step(self.progress.step + 1):
                self._step(batches)
            if self.bad_steps.are_too_many:
                # Behind the refused samples: from before them the run would come to the same place again.
                self.save_checkpoint()
                self.saver.finish()
                raise self.bad_steps.error(self.progress.step)
            self._save_and_evaluate()
            self.saver.report()
        self.saver.finish()
        return self.progress

    def _wishes(self) -> Wishes:
        """What this rank asks for at this moment."""
        # Until the next look at the clock a step goes by, and a save that may have to wait for the one before.
        self.stopper.needs(self.watch.longest_step + 2 * self._longest_save())
        minutes = self.config.checkpoint_every_n_minutes
        over = minutes is not None and time.monotonic() - self._last_checkpoint_time >= 60 * minutes
        # Clocks differ between ranks: rank 0's decides.
        checkpoint = "checkpoint_every_n_minutes" if over and self.topology.is_main else ""
        return Wishes.of_all([Wishes(stop=self.stopper.asked(), checkpoint=checkpoint), self.saver.wishes()])

    def _longest_save(self) -> float:
        """Seconds, as measured on rank 0; before that, as guessed from the usual most: weights, master weights, two values each."""
        guessed = sum(12 * p.numel() + p.nbytes for p in self.trained.parameters.values()) / UNMEASURED_BYTES_PER_SECOND
        return self.saver.longest_save or guessed

    def _stop(self) -> None:
        """Raise Stopped, with all that is done on the disk."""
        self.saver.finish()
        if self.agreed.stop:
            raise Stopped(self.agreed.stop, RUN_AGAIN)
        self.saver.stopped_by_request(self.progress.step)
        raise Stopped(self.agreed.finish, DONE)

    def _step(self, batches: Timed) -> None:
        started = time.perf_counter()
        data = self._data_at(self.progress)
        step = self.progress.step
        factor = self._lr_factor()
        self.trained.optimizer.set_lr(factor)
        result = self.engine.train_step(step, batches)
        seconds = time.perf_counter() - started
        self.progress = data.after
        if self.trained.average is not None and result.applied:
            self.trained.average.update(self.progress.step)
        memory, waited = self._exchange(batches.taken())
        values = {
            "step": self.progress.step,
            "epoch": self.progress.epochs_begun,
            "samples": self.progress.samples,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **self.rates.scaled(factor),
            "seconds": seconds,
            "samples_per_second": data.samples / seconds,
            "data_wait_seconds": waited,
            "stage_memory_gb": memory,
        }
        self.metrics.step(values)
        if result.applied:
            self.bad_steps.good()
        else:
            keys = [key for plan in data.plans for key in plan.keys]
            self.bad_steps.bad(self.progress.step, result.loss, result.grad_norm, keys)
            self.metrics.event("refused_step", {"step": self.progress.step, "samples": keys})

    def _lr_factor(self) -> float:
        return learning_rate_factor(
            self.progress.step,
            schedule=self.config.lr_scheduler,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.schedule.total_steps,
        )

    def _save_and_evaluate(self) -> None:
        """What is due after this step.  The checkpoint comes last: a run that continues from it does not do the rest again."""
        config, step = self.config, self.progress.step
        last = step == self.schedule.total_steps

        work = []
        if self._due(config.eval_every_n_steps, config.eval_every_n_epochs):
            work.append("evaluation")
        if last or self.agreed.export or self._due(config.save_every_n_steps, config.save_every_n_epochs):
            work.append("export")
        self.progress = replace(self.progress, unfinished=work)
        wanted = self.agreed.checkpoint or self._due(config.checkpoint_every_n_steps, config.checkpoint_every_n_epochs)
        wanted = wanted or (config.keep_best and "evaluation" in work)
        self._finish_step()
        if last or wanted:
            self.save_checkpoint()

    def _due(self, every_steps: int | None, every_epochs: int | None) -> bool:
        step, epoch = self.progress.step, self._epoch_that_ended
        by_steps = every_steps is not None and step % every_steps == 0
        return by_steps or (every_epochs is not None and epoch is not None and epoch % every_epochs == 0)

    @property
    def _epoch_that_ended(self) -> int | None:
        """With the last step, counted from 1."""
        return self.progress.epoch if self.progress.epoch_samples == 0 else None

    def _finish_step(self) -> None:
        """Do what is due.  If the ranks agree to end, save with the rest of it still to be done, and raise Stopped."""
        for name in self.progress.unfinished:
            if self.agreed.ends or not {"evaluation": self.evaluate, "export": self._export_step}[name]():
                break
            self.progress = replace(self.progress, unfinished=self.progress.unfinished[1:])
        if self.agreed.ends:
            self.save_checkpoint()
            self._stop()

    def _export_step(self) -> bool:
        config, epoch = self.config, self._epoch_that_ended
        by_epoch = config.save_every_n_steps is None and config.save_every_n_epochs is not None and epoch is not None
        self.saver.export(f"epoch-{epoch:04d}" if by_epoch else f"step-{self.progress.step:08d}", self.trained, self.progress)
        return True

    # ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _data_at(self, progress: Progress) -> DataStep:
        """The global batch of the step that begins at this progress."""
        return data_step(progress, self.order, self.schedule.batch.micro_batches)

    def _training_batches(self) -> Timed:
        """This replica's micro-batches from here to the end, read and prepared ahead of the steps by the loader's workers."""
        topology = self.topology
        if not topology.reads_data:
            return Timed(iter(()))

        def work() -> Iterator[tuple[MicroBatchPlan, Draw]]:
            progress = self.progress
            while progress.step < self.schedule.total_steps:
                data = self._data_at(progress)
                for plan in data.plans[topology.replica :: topology.replicas]:
                    yield plan, Draw(self.config.seed, data.epoch)
                progress = data.after

        return Timed(self.loader.prepared(work()))

    # ── evaluation ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(self) -> bool:
        """Held-out loss: every sample with its fixed noise, at fixed quantiles of the timestep distribution.

        False, and nothing reported, if the ranks agreed to end before it was done.
        """
        measured: dict[str, dict[float, float]] = {}
        for name, data in self.eval_data.items():
            with self.trained.for_evaluation():
                for place in self.config.eval_timesteps:
                    self.watch.phase = f"the evaluation at step {self.progress.step}"
                    if (loss := self._eval_loss(data, place)) is None:
                        return False
                    measured.setdefault(name, {})[place] = loss
        for name, losses in measured.items():
            values: dict[str, Any] = {f"loss_at_{place:g}": loss for place, loss in losses.items()}
            mean = sum(losses.values()) / len(losses)
            log.info("eval %s: loss %.5f at step %d", name, mean, self.progress.step)
            self.metrics.event("eval", {"step": self.progress.step, "dataset": name, "loss": mean, **values})
            self._eval_losses[name] = mean
        self._evaluated_at = self.progress.step
        return True

    def _eval_loss(self, data: EvalData, place: float) -> float | None:
        """None if the ranks agreed to end before it was measured."""
        topology = self.topology
        # One sample each, so that sizes need not fit; replicas that have one less repeat their last, which is not counted.
        plans = [MicroBatchPlan.single(index, sample.key) for index, sample in enumerate(data.samples)]
        mine = plans[topology.replica :: topology.replicas]
        count = -(-len(plans) // topology.replicas)
        padded = mine + (mine or plans)[-1:] * (count - len(mine))
        draw = Draw(self.config.seed, EVALUATION_EPOCH, fixed_time=place)
        batches = data.loader.prepared((plan, draw) for plan in padded) if topology.reads_data else iter(())
        losses: list[float] = []
        everywhere: list[float] = []
        for first in range(0, count, EVAL_CHUNK * topology.stages):
            chunk = min(EVAL_CHUNK * topology.stages, count - first)
            losses += self.engine.evaluate(batches, chunk) or []
            counted = losses[first : len(mine)]
            reports = topology.gather((counted, self._wishes()))
            everywhere += itertools.chain.from_iterable(part for part, _ in reports)
            self.agreed = Wishes.of_all(wishes for _, wishes in reports)
            if self.agreed.ends:
                return None
        return sum(sorted(everywhere)) / len(everywhere)

    # ── saving ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(self) -> None:
        """Begin a checkpoint of the present state; it is written beside training."""
        eval_losses = self._eval_losses if self._evaluated_at == self.progress.step else {}
        self.saver.checkpoint(self.progress, *self.trained.state(), self.record, eval_losses)
        self._last_checkpoint_time = time.monotonic()

    def _exchange(self, waited: float) -> tuple[list[float], float]:
        """The one message of all ranks to all after a step: their wishes, and what is returned: the peak memory of each so far, in
        GB: the GPU's, or without one the process's; and the longest time that one of them has waited for data, in seconds."""
        if self.topology.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.topology.device) / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        reports = self.topology.gather((round(peak, 3), waited, self._wishes()))
        self.agreed = Wishes.of_all(wishes for _, _, wishes in reports)
        return [memory for memory, _, _ in reports], max(waited for _, waited, _ in reports)
