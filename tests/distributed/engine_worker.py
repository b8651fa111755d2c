"""One rank of several small trainings without data files, one after the other; the tests compare what they leave.

Usage: python -m tests.distributed.engine_worker FOLDER, with one ``<case>/settings.json`` below FOLDER for each training.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import load_family
from models.base import ModelFamily
from tests.distributed.harness import free_port
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.checkpoints.manager import Checkpoint, CheckpointManager, Progress
from utils.config.schema import AdapterConfig, EmaConfig, OptimizerConfig
from utils.data.batches.loss_terms import with_loss_terms
from utils.data.values import Batch, MicroBatch
from utils.draw import Draw, generator
from utils.optim.kinds import key_problems
from utils.optim.optimizers import RunOptimizer
from utils.optim.shares import ReplicaShares
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.partition import divide
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.runtime import DTYPES, RuntimePolicy
from utils.topology import Topology
from utils.trained import Trained

GLOBAL_BATCH = 4


@cache
def open_model(settings: str) -> ModelFamily:
    """The family of a case, opened once for all processes that are forked afterwards."""
    options = json.loads(settings)
    Family = load_family(options["type"])
    return Family(Family.Options.model_validate(options))


def open_case(settings: dict) -> tuple[ModelFamily, ModuleType, AdapterManager | None]:
    """The family, its reference in the tests, and the adapter of a case."""
    name = settings["model"]["type"]
    family = open_model(json.dumps(settings["model"]))
    adapter = AdapterManager(AdapterConfig(**settings["adapter"]), family.adapter_targets) if settings["adapter"] else None
    return family, importlib.import_module(f"tests.models.{name}.reference"), adapter


def prepared(family: ModelFamily, reference: ModuleType, index: int, *, uneven: bool = False, seed: int = 3) -> MicroBatch:
    batch = reference.batch(family, index)
    if not uneven:
        return family.prepare_inputs(batch, Draw(seed, 0))
    kept = 1 + index // 2 % 2
    batch = Batch(batch.keys[:kept], {name: values[:kept] for name, values in batch.fields.items()})
    _, frames, height, width = batch.fields["latents"][0].shape
    mask = torch.rand(4 * frames - 3, height, width, generator=generator("mask", index))
    return with_loss_terms(family.prepare_inputs(batch, Draw(seed, 0)), [mask, None][:kept], [0.5, 2.0][:kept])


def perturbed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter as after some training: B is not zero, so that A has a gradient too."""
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator("perturb", name)) for name, value in values.items()}


@dataclass(frozen=True)
class Built:
    """One rank's part of a training."""

    engine: StageEngine
    trained: Trained
    gradients: dict[str, Tensor]
    """Of the first step, as the optimizer gets them."""


def build(
    settings: dict, family: ModelFamily, adapter: AdapterManager | None, topology: Topology, checkpoint: Checkpoint | None
) -> Built:
    with torch.device("meta"):
        transformer = family.build_transformer()
        if adapter:
            adapter.attach(transformer)
        layers = family.layers(transformer)
    boundaries = divide(layers, settings["stages"], "parameters")
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    everywhere = trainable_parameters(transformer)
    mine = {name: everywhere[name] for name in names_of(own, transformer) if name in everywhere}
    trained = perturbed(adapter.first_values(mine.items(), 0, family.weights())) if adapter else {}
    if checkpoint:
        trained = checkpoint.weights(mine)
    fill_stage(transformer, own, family.weights(), trained, topology.device)

    config = OptimizerConfig(**settings["optimizer"])
    optimizer = RunOptimizer(mine, config, shares=ReplicaShares(mine, topology) if config.zero else None)
    policy = RuntimePolicy(topology.device, DTYPES[family.options.dtype], settings["activation_checkpointing"])
    engine = StageEngine.build(
        StageModule(layers, boundaries, topology, policy, seed=5),
        optimizer,
        family.loss,
        trainable_names=list(everywhere),
        accumulation=GLOBAL_BATCH // topology.replicas,
        gradient_clipping=settings["gradient_clipping"],
    )
    ema = EmaConfig(**settings["ema"]) if settings["ema"] else None
    built = Built(engine, Trained(mine, optimizer, ema, topology, checkpoint), {})
    step_as_usual = optimizer.step

    def step() -> None:
        if not built.gradients:
            taken = {name: gradient.clone() for name, gradient in optimizer.gradients().items() if gradient is not None}
            built.gradients.update(taken)
        step_as_usual()

    optimizer.step = step
    return built


def save(built: Built, topology: Topology, out: Path, step: int) -> Checkpoint:
    checkpoints = CheckpointManager(out, topology)
    checkpoints.save(Progress(step), *built.trained.state(), {})
    checkpoint = Checkpoint(checkpoints.finish())
    assert not checkpoint.problems()
    return checkpoint


def run_case(settings: dict, out: Path) -> None:
    topology = Topology.start(settings["stages"])
    family, reference, adapter = open_case(settings)
    before = None
    if settings["continues"]:
        before = CheckpointManager(Path(settings["continues"]), topology).latest()
    built = build(settings, family, adapter, topology, before)
    first_gradients = built.gradients
    first_step = before.progress.step if before else 0
    if before:
        save(built, topology, out, first_step)
    results = []
    for number in range(first_step, settings["steps"]):
        if number == settings["resume_at"]:
            built = build(settings, family, adapter, topology, save(built, topology, out, number))
        mine_now = range(number * GLOBAL_BATCH + topology.replica, (number + 1) * GLOBAL_BATCH, topology.replicas)
        batches = (prepared(family, reference, index, uneven=settings["uneven"]) for index in mine_now)
        result = built.engine.train_step(number, batches)
        results.append([result.loss.hex(), result.grad_norm.hex(), result.applied])
        if built.trained.average is not None and result.applied:
            built.trained.average.update(number + 1)
    if settings["saves"]:
        save(built, topology, out, settings["steps"])
    with built.trained.for_evaluation():
        batches = (prepared(family, reference, index, uneven=settings["uneven"], seed=4) for index in (100, 101))
        held_out = built.engine.evaluate(batches, 2)

    if topology.writes_weights:
        save_file(first_gradients, out / f"gradients-{topology.stage}.safetensors")
        weights = {name: weight.clone() for name, weight in built.trained.weights().items()}
        save_file(weights, out / f"weights-{topology.stage}.safetensors")
    if topology.writes_weights and held_out is not None:
        report = {"steps": results, "held_out": [loss.hex() for loss in held_out]}
        (out / "results.json").write_text(json.dumps(report))
    topology.barrier()
    topology.stop()


def meet(folder: Path) -> None:
    """Give the ranks of one case a port of their own: rank 0 chooses it, the others find it in a file."""
    place, aside = folder / "port", folder / "port.partial"
    if os.environ["RANK"] == "0":
        aside.write_text(str(free_port()))
        aside.rename(place)
    while not place.is_file():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = place.read_text()


def main() -> None:
    """Each case in a process of its own, forked from this one, or the groups of all of them would stay open."""
    for file in sorted(Path(sys.argv[1]).glob("*/settings.json")):
        settings = json.loads(file.read_text())
        # What is opened and imported here, the processes find.
        open_case(settings)
        key_problems(OptimizerConfig(**settings["optimizer"]))
        pid = os.fork()
        if pid == 0:
            meet(file.parent)
            run_case(settings, file.parent)
            return
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit(f"{file.parent.name} ended with {code}")


if __name__ == "__main__":
    main()
