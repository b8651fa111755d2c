"""The training engine: DeepSpeed's pipeline schedule, with our stream, our gradient norm and our optimizer step."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.data.values import MicroBatch
from utils.draw import seed_from
from utils.optim.optimizers import RunOptimizer
from utils.pipeline.compat import PatchedPipelineEngine, QuietPipelineModule
from utils.pipeline.layer import PipelineLayer, Stream
from utils.pipeline.packing import pack, unpack
from utils.runtime import RuntimePolicy
from utils.topology import Topology

LossFunction = Callable[[Stream, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float
    """Mean over the micro-batches of all replicas."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    applied: bool
    """False if the loss or the norm was not finite: then no weight was changed."""


class StageModule(QuietPipelineModule):
    """This rank's layers, and the stream's way through them."""

    def __init__(
        self, layers: Sequence[PipelineLayer], boundaries: list[int], topology: Topology, policy: RuntimePolicy, seed: int
    ):
        super().__init__(list(layers), boundaries, num_stages=topology.stages)
        self.topology, self.policy, self.seed = topology, policy, seed
        self.place = (0, 0)
        """(step, first micro-batch of the step) of the next forward; dropout hangs on it."""
        self.forwards = 0
        for layer in self.forward_funcs:
            layer.autocast = policy.autocast()
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    def begin_step(self, step: int) -> None:
        self.place, self.forwards = (step, self.topology.replica), 0

    def forward(self, inputs: Stream | tuple[Tensor, ...]) -> Stream | tuple[Tensor, ...]:
        """The first stage is given a stream, the others what the stage before packed; the last returns a stream."""
        stream = inputs if isinstance(inputs, Stream) else unpack(inputs)
        step, replica = self.place
        # The micro-batch's index in the global batch, as in EpochOrder: it does not change when replicas become accumulation.
        micro_batch = self.forwards * self.topology.replicas + replica
        self.forwards += 1
        for offset, layer in enumerate(self.forward_funcs):
            stream = self._run_layer(layer, stream, (step, micro_batch, self._local_start + offset))
        is_last = self.stage_id == self.num_stages - 1
        return stream if is_last else pack(stream, self.policy.device)

    def _run_layer(self, layer: PipelineLayer, stream: Stream, place: tuple[int, int, int]) -> Stream:
        def run(stream: Stream) -> Stream:
            if self.has_dropout and self.training:
                torch.manual_seed(seed_from(self.seed, "dropout", *place))
            return layer(stream)

        if self.policy.activation_checkpointing and torch.is_grad_enabled():
            # The random state needs no saving: `run` sets it from the place, the second time too.
            return checkpoint(run, stream, use_reentrant=False, preserve_rng_state=False)
        return run(stream)


class StageEngine(PatchedPipelineEngine):
    """One rank of the pipeline: ``train_step`` and ``evaluate``."""

    @classmethod
    def build(
        cls,
        module: StageModule,
        optimizer: RunOptimizer,
        loss: LossFunction,
        *,
        trainable_names: Sequence[str],
        accumulation: int,
        gradient_clipping: float,
    ) -> "StageEngine":
        """``trainable_names``: the names of all trainable parameters of the model, of every stage."""
        from deepspeed.runtime.config import DeepSpeedConfig

        settings = {
            # It only counts throughput with this: shapes are sent along with each micro-batch, and each weighs the same.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,  # left out, it would be 1.0; clipping is done in `_take_model_step`
            "steps_per_print": 2**31 - 1,
        }
        module.loss_fn = loss
        mpu = module.mpu()
        engine = cls(args=None, model=module, mpu=mpu, config=settings, config_class=DeepSpeedConfig(settings, mpu))
        # Given afterwards: ours is no torch Optimizer, and may have no parameters on this stage.
        engine.optimizer = optimizer
        engine.topology = module.topology
        engine.max_norm = gradient_clipping
        engine.places = {name: index for index, name in enumerate(sorted(trainable_names))}
        engine.topology.copy_to_replicas([parameter.data for parameter in module.parameters() if parameter.requires_grad])
        return engine

    def train_step(self, step: int, batches: Iterator[MicroBatch]) -> StepResult:
        """One optimizer step over ``accumulation`` micro-batches.  Middle stages take nothing from ``batches``."""
        self.module.begin_step(step)
        loss = self.train_batch(self._placed(batches))
        return StepResult(float(loss), self.grad_norm, self.step_applied)

    def evaluate(self, batches: Iterable[MicroBatch], count: int) -> list[float] | None:
        """Losses of ``count`` micro-batches of this replica, without gradients.  None on other than the last stage."""
        self.total_loss = None  # 0.19.8 adds to what training left there
        self.module.begin_step(0)
        losses = self.eval_batch(self._placed(iter(batches)), reduce_output=None, bcast_loss=False, num_micro_batches=count)
        self.module.train()
        return [float(loss) for loss in losses] if losses is not None else None

    def _placed(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[Stream, dict[str, Tensor]]]:
        for batch in batches:
            inputs = Stream({name: self._on_device(tensor) for name, tensor in batch.inputs.items()})
            yield inputs, {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.target.items()}

    def _on_device(self, tensor: Tensor) -> Tensor:
        """But a single whole number stays: layers choose by it, and reading it there would wait for the device."""
        return tensor if tensor.shape == () and tensor.dtype is torch.int64 else tensor.to(self.device, non_blocking=True)

    def _exec_reduce_grads(self) -> None:
        self._complete_gradients()
        self.topology.mean_over_replicas([gradient for gradient in self.optimizer.gradients().values() if gradient is not None])

    def _complete_gradients(self) -> None:
        """Zeros for parameters that only other replicas have a gradient of, so that all take the mean of the same tensors.

        Where a micro-batch runs one of several experts, the replicas may have run different ones.  What no replica has a gradient
        of is left without: the optimizer does not step it.
        """
        gradients = self.optimizer.gradients()
        if self.topology.replicas > 1 and gradients:
            present = torch.tensor([float(gradient is not None) for gradient in gradients.values()], device=self.device)
            self.topology.mean_over_replicas([present])
            self.optimizer.complete_gradients(name for name, share in zip(gradients, present.tolist(), strict=True) if share)

    def _take_model_step(self, lr_kwargs: dict | None = None) -> None:
        """Norm over all stages, one clip, one step; a step that is not finite is refused."""
        gradients = {name: gradient for name, gradient in self.optimizer.gradients().items() if gradient is not None}
        self.grad_norm = self._global_norm(gradients)
        self.step_applied = math.isfinite(self.grad_norm) and self._loss_is_finite()
        if self.step_applied:
            if gradients and 0 < self.max_norm < self.grad_norm:
                # A Python number, so that every stage multiplies by the same bits.
                torch._foreach_mul_(list(gradients.values()), self.max_norm / self.grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_steps += 1

    def _loss_is_finite(self) -> bool:
        """Whether all replicas' losses are finite; a loss that is not makes gradients that are not, except through a zero."""
        bad = torch.zeros(1, device=self.device)
        if self.is_last_stage():
            bad += (~torch.isfinite(self.total_loss)).float()
        self.topology.sum_over_stages(bad)
        self.topology.mean_over_replicas([bad])
        return not bool(bad)

    def _global_norm(self, gradients: dict[str, Tensor]) -> float:
        """Norm of the gradient of all stages.

        Squares are summed per parameter in fp64 and put at the parameter's own place in one vector, zero where another stage owns
        it.  The sum over stages is then exact, and the sum over places has the same order however the layers are divided.
        """
        squares = torch.zeros(len(self.places), dtype=torch.float64, device=self.device)
        for name, gradient in gradients.items():
            squares[self.places[name]] = gradient.double().pow(2).sum()
        return float(self.topology.sum_over_stages(squares).sum().sqrt())
