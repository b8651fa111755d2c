"""Ranks, stages and replicas, and the few small messages between them.  The only user of torch.distributed.

Rank ``r`` of ``stages x replicas`` processes is stage ``r // replicas`` of replica ``r % replicas`` (DeepSpeed's own order:
the stages of one replica may lie on several nodes, since activations are smaller messages than gradients).
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError
from utils.stopping import Stopped

# The variables that torch.distributed reads, and what Slurm's srun calls them.
SLURM_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def read_environment() -> None:
    """Fill in torch.distributed's variables from whatever started this process: deepspeed, torchrun, srun, or plain python."""
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        environment.update({ours: environment[slurm] for ours, slurm in SLURM_VARIABLES.items() if slurm in environment})
        environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    environment.setdefault("LOCAL_RANK", "0")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replicas_for(world_size: int, stages: int) -> int:
    """Copies of the model, or UserError if the stages do not divide the processes."""
    if world_size % stages:
        allowed = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"pipeline_stages = {stages} does not divide the {world_size} processes of this run; "
            f"use {allowed}, or start a multiple of {stages} processes"
        )
    return world_size // stages


@dataclass(frozen=True)
class Topology:
    """Where this process stands."""

    rank: int
    world_size: int
    stages: int
    device: torch.device
    stage_groups: dict[int, Any] = field(repr=False)
    """For each replica, the group of its stages."""
    replica_groups: dict[int, Any] = field(repr=False)
    """For each stage, the group of its replicas."""
    control_group: Any = field(repr=False)
    """All ranks over gloo, for small Python values.  It waits for hours, since rank 0 may have a large data set to look at."""

    @property
    def replicas(self) -> int:
        return self.world_size // self.stages

    @property
    def stage(self) -> int:
        return self.rank // self.replicas

    @property
    def replica(self) -> int:
        return self.rank % self.replicas

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def reads_data(self) -> bool:
        """The first stage has the inputs, the last one the targets; those between get everything from their neighbours."""
        return self.stage in (0, self.stages - 1)

    @property
    def writes_weights(self) -> bool:
        """One replica of each stage writes; the others hold the same."""
        return self.replica == 0

    @classmethod
    def start(cls, stages: int, timeout_minutes: float = 30) -> "Topology":
        """Join the other processes.  Raises UserError if the stages do not divide them."""
        read_environment()
        world_size, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        replicas = replicas_for(world_size, stages)
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                raise UserError(f"process {local_rank} of this machine has no GPU: there are {gpus}; start one process per GPU")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            _share_cores()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
        # Every process makes every group, in the same order: torch.distributed asks for that.
        stage_groups = {r: dist.new_group([s * replicas + r for s in range(stages)]) for r in range(replicas)}
        replica_groups = {s: dist.new_group([s * replicas + r for r in range(replicas)]) for s in range(stages)}
        control_group = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
        return cls(rank, world_size, stages, device, stage_groups, replica_groups, control_group)

    @staticmethod
    def is_started() -> bool:
        return dist.is_initialized()

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """A small Python value from one rank to all."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.control_group)
        return box[0]

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Call the function on rank 0 alone and give its result, or its UserError or Stopped, to every rank."""
        result: Any = None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                error.everywhere = True
                result = error
            except Stopped as stopped:
                result = stopped
        result = self.broadcast(result)
        if isinstance(result, UserError | Stopped):
            raise result
        return result

    def gather(self, value: Any) -> list[Any]:
        """A small Python value of every rank, in the order of the ranks, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def post(self, key: str, text: str) -> None:
        """Leave a text for another rank, which collects it when it likes.  For threads beside training, too."""
        _store().set(key, text)

    def collect(self, key: str) -> str | None:
        """A text that was posted, which is then gone; None if there is none yet."""
        store = _store()
        if not store.check([key]):
            return None
        text = store.get(key).decode()
        store.delete_key(key)
        return text

    def count(self, key: str, amount: int = 1) -> int:
        """Add to a number that all ranks share, 0 at first, and return it.  It waits for nobody."""
        return _store().add(key, amount)

    def posted(self, keys: Sequence[str]) -> list[str] | None:
        """The texts that were posted under all of the keys, which stay there; None if one is missing yet."""
        store = _store()
        return [store.get(key).decode() for key in keys] if store.check(list(keys)) else None

    def sum_over_stages(self, tensor: Tensor) -> Tensor:
        """In-place sum over the stages of this replica."""
        if self.stages > 1:
            dist.all_reduce(tensor, group=self.stage_groups[self.replica])
        return tensor

    def mean_over_replicas(self, tensors: Sequence[Tensor], bucket_elements: int = 1 << 26) -> None:
        """In-place mean over the replicas of this stage, in flat buckets of one dtype."""
        if self.replicas == 1:
            return
        for bucket in _buckets(tensors, bucket_elements):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.replica_groups[self.stage])
            flat /= self.replicas
            _scatter(flat, bucket)

    def copy_to_replicas(self, tensors: Sequence[Tensor], source: int = 0, bucket_elements: int = 1 << 26) -> None:
        """The values of replica ``source`` to the other replicas of this stage, in flat buckets of one dtype."""
        if self.replicas == 1:
            return
        for bucket in _buckets(tensors, bucket_elements):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, src=self.stage * self.replicas + source, group=self.replica_groups[self.stage])
            if self.replica != source:
                _scatter(flat, bucket)


def _store() -> dist.Store:
    """The table of texts through which the processes found each other.  It never waits, unlike a collective."""
    return dist.distributed_c10d._get_default_store()


def _scatter(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """The parts of a flat tensor into the tensors that it was put together from."""
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor], bucket_elements: int) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        if buckets and buckets[-1][0].dtype is tensor.dtype and filled + tensor.numel() <= bucket_elements:
            buckets[-1].append(tensor)
        else:
            buckets.append([tensor])
            filled = 0
        filled += tensor.numel()
    return buckets


def _share_cores() -> None:
    """On the CPU, processes of one machine share its cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        # torchrun and deepspeed set LOCAL_WORLD_SIZE or LOCAL_SIZE; for one node the world's size is the same.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
