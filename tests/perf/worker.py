"""One rank of a benchmark: ``python -m tests.perf.worker WHAT OUT``; writes its measurements to ``OUT/rank-N.json``."""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

from models.wan.keys import wan_key_map
from models.wan.layers import wan_layers
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.checkpoints.checkpoint import Progress
from utils.checkpoints.manager import CheckpointManager
from utils.checkpoints.retention import Retention
from utils.config.schema import AdapterConfig, OptimizerConfig
from utils.data.values import MicroBatch
from utils.diffusion.losses import averaged
from utils.draw import generator
from utils.optim.optimizers import RunOptimizer
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.partition import divide
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.runtime import RuntimePolicy
from utils.topology import Topology
from utils.weights.named import WeightSource, materialise

TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
ADAPTER = AdapterConfig(rank=16)
OPTIMIZER = OptimizerConfig(type="adamw", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
CLIP = 1.0
SHAPE = {"num_attention_heads": 8, "attention_head_dim": 64, "text_dim": 64, "freq_dim": 256, "ffn_dim": 1536, "num_layers": 8}
ROUNDS = 9


def micro_batch(index: int) -> MicroBatch:
    def noise(name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator("benchmark", index, name))

    inputs = {"x": noise("x", 1, 16, 3, 20, 20), "t": torch.tensor([500.0]), "text": noise("text", 1, 512, SHAPE["text_dim"])}
    return MicroBatch(inputs, {"velocity": noise("velocity", 1, 16, 3, 20, 20)})


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def build_model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SHAPE).train()


def build_engine(topology: Topology, accumulation: int) -> StageEngine:
    transformer = build_model()
    manager = AdapterManager(ADAPTER, TARGETS)
    manager.attach(transformer)
    everywhere = trainable_parameters(transformer)
    first = manager.first_values(everywhere.items(), 0)
    layers = wan_layers(transformer)
    blocks = len(transformer.blocks)
    # Equal blocks on each stage; the embedder and the head are small beside them.
    split = [1 + blocks * stage // topology.stages for stage in range(1, topology.stages)]
    boundaries = divide(layers, topology.stages, "manual", split)
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    mine = {name: everywhere[name] for name in names_of(own, transformer) if name in everywhere}
    materialise(transformer, list(mine), first, device=topology.device)
    return StageEngine.build(
        StageModule(layers, boundaries, topology, RuntimePolicy(topology.device, torch.float32), seed=0),
        RunOptimizer(mine, OPTIMIZER),
        lambda output, target: averaged(output["prediction"], target["velocity"]),
        trainable_names=list(everywhere),
        accumulation=accumulation,
        gradient_clipping=CLIP,
    )


def step_overhead(out: Path) -> dict:
    """One stage against a plain diffusers + PEFT loop: the same model, batch and optimizer, steps taken in turn."""
    engine = build_engine(Topology.start(1), accumulation=1)
    plain = build_model()
    plain.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.rank, target_modules=TARGETS), plain)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay)
    batch = micro_batch(0)

    def plain_step() -> None:
        optimizer.zero_grad()
        inputs = batch.inputs
        prediction = plain(inputs["x"], inputs["t"], inputs["text"], return_dict=False)[0]
        averaged(prediction, batch.target["velocity"]).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()

    ours, plains = [], []
    for round_number in range(ROUNDS + 2):
        both = (seconds(lambda step=round_number: engine.train_step(step, iter([batch]))), seconds(plain_step))
        if round_number >= 2:  # the first ones warm up
            ours.append(both[0])
            plains.append(both[1])
    return {"ours": statistics.median(ours), "plain": statistics.median(plains)}


def stage_speed(out: Path) -> dict:
    """Eight micro-batches a step on as many stages as there are processes."""
    topology = Topology.start(int(os.environ["WORLD_SIZE"]))
    engine = build_engine(topology, accumulation=8)
    batches = [micro_batch(index) for index in range(8)]
    times = [seconds(lambda step=step: engine.train_step(step, iter(batches))) for step in range(4)]
    return {"seconds": statistics.median(times[1:])}


def load_memory(out: Path) -> dict:
    """Peak memory of this rank after its stage was read, and the size of the stage's weights."""
    topology = Topology.start(int(os.environ["WORLD_SIZE"]))
    config = json.loads((out / "config.json").read_text())
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config).to(torch.bfloat16)
        AdapterManager(ADAPTER, TARGETS).attach(transformer)
        layers = wan_layers(transformer)
    boundaries = divide(layers, topology.stages, "parameters")
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    mine = [(name, tensor) for name, tensor in trainable_parameters(transformer).items() if name in names_of(own, transformer)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first = AdapterManager(ADAPTER, TARGETS).first_values(mine, 0)
    fill_stage(transformer, own, WeightSource(out / "model.safetensors", wan_key_map()), first, topology.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stage = sum(tensor.nbytes for layer in own for tensor in layer.parameters())
    return {"before": before, "peak": peak, "stage": stage}


def checkpoint_pause(out: Path) -> dict:
    """How long training stands still for checkpoints of more than 1 GB, and how long safetensors takes to write the same bytes."""
    checkpoints = CheckpointManager(out, Topology.start(1), Retention(last=1))
    shapes = {f"blocks.{number}.weight": (2048, 2048) for number in range(22)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    state = {f"{name}::{key}": torch.randn(shape) for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")}
    pauses, plains = [], []
    for step in range(1, 5):
        plains.append(seconds(lambda: save_file({**weights, **state}, out / "plain.safetensors")))
        (out / "plain.safetensors").unlink()
        pauses.append(seconds(lambda step=step: checkpoints.save(Progress(step), {"weights": weights, "optimizer": state}, {}, {})))
        assert checkpoints.finish(), checkpoints.poll()
    saved = checkpoints.poll()
    return {"bytes": saved[0].bytes, "pauses": pauses, "plains": plains, "written": [one.seconds for one in saved]}


def checkpoint_speed(out: Path) -> dict:
    """Twenty steps after a checkpoint was begun, and twenty without one, in turn."""
    topology = Topology.start(1)
    engine = build_engine(topology, accumulation=1)
    checkpoints = CheckpointManager(out, topology, Retention(last=1))
    batch = micro_batch(0)
    step = 0

    def steps(with_checkpoint: bool) -> None:
        nonlocal step
        if with_checkpoint:
            tensors, scalars = engine.optimizer.state()
            weights = {name: weight.data for name, weight in engine.module.named_parameters() if weight.requires_grad}
            checkpoints.save(Progress(step), {"weights": weights, "optimizer": tensors}, {"optimizer": scalars}, {})
        for _ in range(20):
            engine.train_step(step, iter([batch]))
            step += 1

    steps(with_checkpoint=True)  # the first ones warm up
    found = {"with": [], "without": []}
    for _ in range(4):
        found["without"].append(seconds(lambda: steps(with_checkpoint=False)))
        found["with"].append(seconds(lambda: steps(with_checkpoint=True)))
    assert checkpoints.finish(), checkpoints.poll()
    assert not any(saved.errors for saved in checkpoints.poll())
    return found


BENCHMARKS = {
    "step_overhead": step_overhead,
    "stage_speed": stage_speed,
    "load_memory": load_memory,
    "checkpoint_pause": checkpoint_pause,
    "checkpoint_speed": checkpoint_speed,
}


def main() -> None:
    what, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    result = BENCHMARKS[what](out)
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
