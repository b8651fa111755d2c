"""Every workaround of DeepSpeed's behaviour, each with the reason, the version it was measured with, and when it may go."""

import contextlib
import io
import logging
import os
from typing import Any

import torch
from torch import Tensor

# DeepSpeed asks for an accelerator at import: without a GPU it must be told.  (0.19.8; it may go when the CPU is found by itself
# in a build of torch with CUDA on a machine without.)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def init_distributed() -> None:
    """Let DeepSpeed use the process group that is there already.

    On the CPU it would first compile a shared-memory operation (25 s, and an error without a compiler), which gloo does not need
    (0.19.8; may go when that build is optional).
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )


class QuietPipelineModule(PipelineModule):
    """PipelineModule that takes layers which are divided already and hold their weights."""

    def __init__(self, layers: list[Any], boundaries: list[int], num_stages: int):
        init_distributed()
        self._boundaries = boundaries
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
            super().__init__(layers, num_stages=num_stages, dynamic_shape=True)

    def _partition_layers(self, method: str = "") -> None:
        # 0.19.8 counts trainable parameters only; our own boundaries come from utils/pipeline/partition.py.
        self.parts = self._boundaries
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def to(self, *args: Any, **kwargs: Any) -> "QuietPipelineModule":
        """Nothing: the layers were put in place when their weights were read, and those of other stages stay on meta."""
        return self


class PatchedPipelineEngine(PipelineEngine):
    """PipelineEngine without what it does wrong or twice for us (all measured with 0.19.8)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The schedule finds its methods in a table, past any override; the table is made anew from the subclass."""
        super().__init_subclass__(**kwargs)
        cls._INSTRUCTION_MAP = {step: getattr(cls, method.__name__) for step, method in PipelineEngine._INSTRUCTION_MAP.items()}

    def _broadcast_model(self) -> None:
        """Skipped: it sends every frozen weight.  The engine sends the trainable ones itself."""

    def _allocate_or_extend_buffers(self, idx: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        """A fresh buffer.  The original shares one list, regardless of dtype, between received activations and gradients, so
        that a stage in the middle corrupts them and evaluation after training receives bytes into floats."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """Inputs and targets are named tensors here; the original takes tuples and copies each one twice."""
        batch = self._next_batch()
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = batch[0]
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = batch[1]
