"""One rank of several small trainings without data files, one after the other; the tests compare what they leave.

Usage: python -m tests.distributed.engine_worker FOLDER, with one ``<case>/settings.json`` below FOLDER for each training.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

from models import load_family
from models.base import ModelFamily
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.config.schema import AdapterConfig, OptimizerConfig
from utils.data.values import MicroBatch
from utils.draw import Draw, generator
from utils.optim.optimizers import RunOptimizer
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.partition import divide
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.runtime import DTYPES, RuntimePolicy
from utils.topology import Topology

GLOBAL_BATCH = 4


def open_case(settings: dict) -> tuple[ModelFamily, ModuleType, AdapterManager | None]:
    """The family, its reference in the tests, and the adapter of a case."""
    name = settings["model"]["type"]
    Family = load_family(name)
    family = Family(Family.Options.model_validate(settings["model"]))
    adapter = AdapterManager(AdapterConfig(**settings["adapter"]), family.adapter_targets) if settings["adapter"] else None
    return family, importlib.import_module(f"tests.models.{name}.reference"), adapter


def prepared(family: ModelFamily, reference: ModuleType, index: int, seed: int = 3) -> MicroBatch:
    return family.prepare_inputs(reference.batch(family, index), Draw(seed, 0))


def perturbed(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter as after some training: B is not zero, so that A has a gradient too."""
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator("perturb", name)) for name, value in values.items()}


def run_case(settings: dict, out: Path) -> None:
    topology = Topology.start(settings["stages"])
    family, reference, adapter = open_case(settings)
    with torch.device("meta"):
        transformer = family.build_transformer()
        if adapter:
            adapter.attach(transformer)
        layers = family.layers(transformer)
    boundaries = divide(layers, settings["stages"], "parameters")
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    everywhere = trainable_parameters(transformer)
    mine = {name: everywhere[name] for name in names_of(own, transformer) if name in everywhere}
    first = perturbed(adapter.first_values(mine.items(), 0)) if adapter else {}
    fill_stage(transformer, own, family.weights(), first, topology.device)

    optimizer = RunOptimizer(mine, OptimizerConfig(**settings["optimizer"]))
    policy = RuntimePolicy(topology.device, DTYPES[family.options.dtype], settings["activation_checkpointing"])
    engine = StageEngine.build(
        StageModule(layers, boundaries, topology, policy, seed=5),
        optimizer,
        family.loss,
        trainable_names=list(everywhere),
        micro_batch_size=2,
        accumulation=GLOBAL_BATCH // topology.replicas,
        gradient_clipping=settings["gradient_clipping"],
    )
    gradients: dict[str, torch.Tensor] = {}
    step_as_usual = optimizer.step

    def step() -> None:
        if not gradients:
            gradients.update({name: gradient.clone() for name, gradient in optimizer.gradients().items() if gradient is not None})
        step_as_usual()

    optimizer.step = step
    results = []
    for number in range(settings["steps"]):
        mine_now = range(number * GLOBAL_BATCH + topology.replica, (number + 1) * GLOBAL_BATCH, topology.replicas)
        result = engine.train_step(number, (prepared(family, reference, index) for index in mine_now))
        results.append([result.loss.hex(), result.grad_norm.hex(), result.applied])
    held_out = engine.evaluate((prepared(family, reference, index, seed=4) for index in (100, 101)), 2)

    if topology.writes_weights:
        save_file(gradients, out / f"gradients-{topology.stage}.safetensors")
        weights = {name: parameter.detach().clone() for name, parameter in mine.items()}
        save_file(weights, out / f"weights-{topology.stage}.safetensors")
    if topology.writes_weights and held_out is not None:
        report = {"steps": results, "held_out": [loss.hex() for loss in held_out], "boundaries": boundaries}
        (out / "results.json").write_text(json.dumps(report))
    topology.barrier()


def main() -> None:
    for file in sorted(Path(sys.argv[1]).glob("*/settings.json")):
        run_case(json.loads(file.read_text()), file.parent)


if __name__ == "__main__":
    main()
