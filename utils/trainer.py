"""The training loop: steps, and when to evaluate and save what."""

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from utils.bad_steps import BadSteps
from utils.checkpoints.checkpoint import Checkpoint, Progress
from utils.config.schema import RunConfig
from utils.data.batches.loader import BatchLoader, Timed
from utils.data.batches.order import EpochOrder, MicroBatchPlan
from utils.draw import Draw
from utils.evaluation import EvalData, Evaluation
from utils.metrics import MetricLog
from utils.optim.rates import LearningRates
from utils.optim.schedules import learning_rate_factor
from utils.pipeline.engine import StageEngine
from utils.resume import report_resume
from utils.saving import RunSaver
from utils.schedule import DataStep, Schedule, data_fingerprint, data_step
from utils.stopping import Stopped, Stopper, Wishes
from utils.topology import Topology
from utils.trained import Trained
from utils.watchdog import Watchdog

log = logging.getLogger(__name__)

# So many samples of refused steps are named in the error that ends the run; the others are in the log.
NAMED_SAMPLES = 12
# What writing a checkpoint is thought to do before one was measured.
UNMEASURED_BYTES_PER_SECOND = 2e8


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
        self.order, self.loader = order, loader
        self.saver, self.metrics, self.stopper, self.watch = saver, metrics, stopper, watch
        held_out = {"timesteps": config.eval_timesteps, "seed": config.seed}
        self.evaluation = Evaluation(topology, engine, trained, eval_data, metrics, **held_out)
        self.agreed = Wishes()
        """What the ranks asked for at their last exchange."""
        self.record = {**record, "seed": config.seed, "data": data_fingerprint(order)}
        self.progress, self.schedule = progress, Schedule.of(config, order, topology.replicas, progress)
        self.bad_steps = BadSteps(config.max_bad_steps)
        self._last_checkpoint_time = time.monotonic()
        if checkpoint is not None:
            self.saver.checkpoints.resumed_from(checkpoint)
            if topology.is_main:
                report_resume(checkpoint, self.record, progress, order, self.schedule, rates.default * self._lr_factor())

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> Progress:
        """Train to the end of the schedule; returns the final progress.  Raises Stopped if the ranks agreed to end before."""
        self._agree(None)  # what was asked for during the start
        if self.progress.unfinished:
            log.info("the run was stopped before this was done: %s", ", ".join(self.progress.unfinished))
            self._finish_step()
        if self.progress.step >= self.schedule.total_steps:
            log.info("the run is finished: %d of %d steps are done", self.progress.step, self.schedule.total_steps)
            self.saver.finished()
            return self.progress
        if self.config.eval_before_first_step and self.progress.step == 0 and not self.agreed.ends:
            self.evaluate()
        if self.agreed.ends:
            self._stop()  # there is nothing to save yet
        batches = self._training_batches()
        while self.progress.step < self.schedule.total_steps:
            with self.watch.step(self.progress.step + 1):
                self._step(batches)
            if self.bad_steps.are_too_many:
                # Behind the refused samples: from before them the run would come to the same place again.
                self.save_checkpoint()
                self._finish_saving()
                raise self.bad_steps.error(self.progress.step)
            self._save_and_evaluate()
            self.saver.report()
        self._finish_saving()
        self.saver.finished()
        return self.progress

    def _wishes(self) -> Wishes:
        """What this rank asks for at this moment."""
        # Until the next look at the clock a step or an export goes by, and a save that may have to wait for the one before.
        self.stopper.needs(max(self.watch.longest_step, self.saver.longest_export) + 2 * self._longest_save())
        minutes = self.config.checkpoint_every_n_minutes
        over = minutes is not None and time.monotonic() - self._last_checkpoint_time >= 60 * minutes
        # Clocks differ between ranks: rank 0's decides.
        checkpoint = "checkpoint_every_n_minutes" if over and self.topology.is_main else ""
        return Wishes.of_all([self.stopper.wishes(), Wishes(checkpoint=checkpoint), self.saver.wishes()])

    def _longest_save(self) -> float:
        """Seconds, as measured on rank 0; before that, as guessed from the usual most: weights, master weights, two values each."""
        guessed = sum(12 * p.numel() + p.nbytes for p in self.trained.parameters.values()) / UNMEASURED_BYTES_PER_SECOND
        return self.saver.longest_save or guessed

    def _stop(self) -> None:
        """Raise Stopped, with all that is done on the disk."""
        self._finish_saving()
        raise Stopped.by(self.agreed)

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
        wanted = last or self.agreed.checkpoint or self._due(config.checkpoint_every_n_steps, config.checkpoint_every_n_epochs)
        wanted = wanted or (config.keep_best and "evaluation" in work)
        self._finish_step()
        if wanted or self.agreed.checkpoint:  # it may have been asked for meanwhile
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
        while self.progress.unfinished and not self.agreed.ends:
            name, *rest = self.progress.unfinished
            if not {"evaluation": self.evaluate, "export": self._export_step}[name]():
                break
            if self.agreed.export and name != "export" and "export" not in rest:
                rest.append("export")  # it was asked for meanwhile
            self.progress = replace(self.progress, unfinished=rest)
        if self.agreed.ends:
            self.save_checkpoint()
            self._stop()

    def _export_step(self) -> bool:
        config, epoch = self.config, self._epoch_that_ended
        by_epoch = config.save_every_n_steps is None and config.save_every_n_epochs is not None and epoch is not None
        self.watch.phase = f"the export at step {self.progress.step}"
        self.saver.export(f"epoch-{epoch:04d}" if by_epoch else f"step-{self.progress.step:08d}", self.trained, self.progress)
        self._agree(None)  # it may have taken long
        return True

    def evaluate(self) -> bool:
        """False, and nothing reported, if the ranks agreed to end before it was done."""
        self.watch.phase = f"the evaluation at step {self.progress.step}"
        return self.evaluation.measure(self.progress.step, self._agree)

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

    # ── saving ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(self) -> None:
        """Begin a checkpoint of the present state; it is written beside training."""
        self.watch.phase = f"the checkpoint at step {self.progress.step}"
        self.saver.checkpoint(self.progress, *self.trained.state(), self.record, self.evaluation.losses_at(self.progress.step))
        self._last_checkpoint_time = time.monotonic()

    def _finish_saving(self) -> None:
        """Wait until what was begun is on the disk."""
        self.watch.phase = f"the writing of what was saved at step {self.progress.step}"
        self.saver.finish()

    def _agree(self, value: Any) -> tuple[list[Any], bool]:
        """The one message of all ranks to all: their wishes, and a value.  The value of each, and whether they agreed to end."""
        reports = self.topology.gather((value, self._wishes()))
        self.agreed = Wishes.of_all(wishes for _, wishes in reports)
        return [value for value, _ in reports], bool(self.agreed.ends)

    def _exchange(self, waited: float) -> tuple[list[float], float]:
        """What all ask for after a step; and, returned, the peak memory of each rank so far, in GB: the GPU's, or without one the
        process's; and the longest time that one of them has waited for data, in seconds."""
        if self.topology.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.topology.device) / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        reports, _ = self._agree((round(peak, 3), waited))
        return [memory for memory, _ in reports], max(waited for _, waited in reports)
