"""One rank of a small training without data files: prints nothing, writes losses, norms and gradients for the tests to compare.

Usage: python -m tests.distributed.engine_worker SETTINGS.json
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from models import load_family
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.config.schema import AdapterConfig, OptimizerConfig
from utils.data.values import Batch
from utils.draw import Draw, generator
from utils.optim.optimizers import RunOptimizer
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.partition import divide
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.runtime import DTYPES, RuntimePolicy
from utils.topology import Topology

GLOBAL_BATCH = 4


def batch(index: int, settings: dict) -> Batch:
    """Micro-batch ``index``: two samples, of alternating shapes."""
    frames, height, width = [(3, 8, 8), (1, 4, 12)][index % 2]

    def field(name: str, *shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator("worker", index, name, sample)) for sample in range(2)]

    fields = {
        "latents": field("latents", 16, frames, height, width),
        "text": [torch.randn(length, settings["text_dim"], generator=generator("text", index, length)) for length in (7, 12)],
    }
    if settings["image_dim"]:
        fields["condition"] = field("condition", 16, frames, height, width)
        fields["clip"] = field("clip", 257, settings["image_dim"])
    return Batch(keys=[f"worker/{index}.{sample}#0" for sample in range(2)], fields=fields)


def perturbed(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter as after some training: B is not zero, so that A has a gradient too."""
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator("perturb", name)) for name, value in values.items()}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[1]).parent
    topology = Topology.start(settings["stages"])
    Family = load_family(settings["model"]["type"])
    family = Family(Family.Options.model_validate(settings["model"]))
    settings |= {"text_dim": family.config["text_dim"], "image_dim": family.config.get("image_dim")}
    adapter = AdapterManager(AdapterConfig(**settings["adapter"]), family.adapter_targets) if settings["adapter"] else None
    with torch.device("meta"):
        transformer = family.build_transformer()
        if adapter:
            adapter.attach(transformer)
        layers = family.layers(transformer)
    boundaries = divide(layers, settings["stages"], "parameters")
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    everywhere = trainable_parameters(transformer)
    mine = {name: everywhere[name] for name in names_of(own, transformer) if name in everywhere}
    fill_stage(
        transformer, own, family.weights(), perturbed(adapter.first_values(mine.items(), 0)) if adapter else {}, topology.device
    )

    optimizer = RunOptimizer(mine, OptimizerConfig(**settings["optimizer"]))
    policy = RuntimePolicy(topology.device, DTYPES[family.options.dtype], settings.get("activation_checkpointing", False))
    accumulation = GLOBAL_BATCH // topology.replicas
    engine = StageEngine.build(
        StageModule(layers, boundaries, topology, policy, seed=5),
        optimizer,
        family.loss,
        trainable_names=list(everywhere),
        micro_batch_size=2,
        accumulation=accumulation,
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
        prepared = (family.prepare_inputs(batch(index, settings), Draw(3, 0)) for index in mine_now)
        result = engine.train_step(number, prepared)
        results.append([result.loss.hex(), result.grad_norm.hex(), result.applied])
    held_out = engine.evaluate((family.prepare_inputs(batch(index, settings), Draw(4, 0)) for index in (100, 101)), 2)

    if topology.writes_weights:
        save_file(gradients, out / f"gradients-{topology.stage}.safetensors")
        save_file(
            {name: parameter.detach().clone() for name, parameter in mine.items()}, out / f"weights-{topology.stage}.safetensors"
        )
    if topology.writes_weights and held_out is not None:
        report = {"steps": results, "held_out": [loss.hex() for loss in held_out], "boundaries": boundaries}
        (out / "results.json").write_text(json.dumps(report))
    topology.stop()


if __name__ == "__main__":
    main()
