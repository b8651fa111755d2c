"""Train a diffusion transformer over pipeline stages.

    deepspeed train.py --config FILE        one process per GPU; the same with torchrun or srun, or bare python for one process

The run as a story: read the config, look at the data, encode it, build this rank's layers, train.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import load_family
from models.base import ModelFamily
from utils.adapters.manager import AdapterManager, MergedWeights, adaptable_modules, trainable_parameters
from utils.checkpoints.export import LoraFile, TrainingFacts, export_full, export_lora, load_lora
from utils.checkpoints.manager import CheckpointManager
from utils.checkpoints.run_exports import RunExporter, WriteExport
from utils.checkpoints.weights import NamedWeights, check_names
from utils.config.dump import dump_config
from utils.config.load import LoadedConfig, load_config
from utils.config.schema import RunConfig
from utils.data.batches import BatchLoader, EpochOrder
from utils.data.cache import DatasetCache
from utils.data.sources import Scan, scan
from utils.errors import UserError, listed
from utils.metrics import MetricLog, setup_logging
from utils.optim.optimizers import RunOptimizer, couples_parameters, optimizer_problems
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.layer import PipelineLayer
from utils.pipeline.partition import divide, layer_weights
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.run import load_checkpoint, open_run
from utils.runtime import DTYPES, RuntimePolicy
from utils.topology import Topology, read_environment, replicas_for
from utils.trainer import EvalData, Schedule, Trainer

log = logging.getLogger("flowstage")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a diffusion transformer over pipeline stages.")
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="latest|PATH", help="continue from the newest checkpoint, or from this one"
    )
    parser.add_argument("--check", action="store_true", help="tell everything that can be known without training; exit code 0 or 2")
    parser.add_argument("--cache-only", action="store_true", help="encode the data and stop")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="change a key of the TOML (repeatable)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def main() -> int:
    """Exit code: 0 done, 2 something that the user can put right."""
    args = parse_arguments()
    read_environment()
    rank = int(os.environ["RANK"])
    setup_logging(None, rank)
    try:
        loaded = load_config(args.config, lambda name: load_family(name).Options, args.set)
        refuse_optimizer(loaded.run)
        for notice in loaded.notices:
            log.info("%s", notice)
        return check(loaded) if args.check else run(loaded, args)
    except UserError as error:
        # Before the ranks have met, each of them finds the same; later most errors are one rank's own.
        if rank == 0 or (Topology.is_started() and not error.everywhere):
            log.error("%s", error)
        return 2


def refuse_optimizer(config: RunConfig) -> None:
    """Raises UserError for an optimizer that cannot serve this run."""
    if problems := optimizer_problems(config.optimizer):
        raise UserError(listed(problems, "the optimizer cannot be used:"))
    if config.pipeline_stages > 1 and couples_parameters(config.optimizer):
        raise UserError(
            f"optimizer.type = {config.optimizer.type!r} computes one value from all parameters, which on {config.pipeline_stages} "
            "stages would be another value on each; use pipeline_stages = 1, or another optimizer"
        )


# ── what can be known without training ────────────────────────────────────────────────────────────────────────────────────


def check(loaded: LoadedConfig) -> int:
    """Log what the run would do.  Raises UserError with what is wrong."""
    config = loaded.run
    family = load_family(config.model.type)(config.model)
    transformer, layers, boundaries, adapter = build_layers(config, family)
    encoders = family.encoders()
    read_loras(config, family, adapter, transformer)
    processes = int(os.environ["WORLD_SIZE"])
    replicas = replicas_for(processes, config.pipeline_stages) if processes > 1 else 1
    log.info("model: %s, %s; encoders: %s", family.variant, describe_weights(transformer), ", ".join(e.name for e in encoders))
    for stage in range(config.pipeline_stages):
        start, stop = boundaries[stage], boundaries[stage + 1]
        weights = sum(layer_weights(layers[start:stop]))
        log.info(
            "stage %d: layers %d to %d (%s), %.3g weights", stage, start, stop - 1, describe_layers(layers[start:stop]), weights
        )
    for name, dataset in {"training": loaded.dataset, **loaded.eval_datasets}.items():
        found = scan(dataset, family.size_rules, hash_cache=None)
        log.info("%s data:\n%s", name, "\n".join(found.report.lines()))
        if name == "training":
            order = EpochOrder(found.samples, config.micro_batch_size_per_gpu, config.seed)
            schedule = Schedule.of(config, order, replicas)
            log.info("%s", "\n".join(order.report(replicas * config.gradient_accumulation_steps)))
            log.info(
                "%d steps per epoch, %d steps in all, with %d replica(s)", schedule.steps_per_epoch, schedule.total_steps, replicas
            )
    log.info("the config is good")
    return 0


def describe_weights(transformer: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return f"{total:.4g} weights, {trained:.4g} of them trained"


def describe_layers(layers: list[PipelineLayer]) -> str:
    kinds = [type(layer).__name__ for layer in layers]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(loaded: LoadedConfig, args: argparse.Namespace) -> int:
    config = loaded.run
    # The model without its weights: names, shapes, layers, stages.  What does not fit is found before anything takes time.
    family = load_family(config.model.type)(config.model)
    transformer, layers, boundaries, adapter = build_layers(config, family)
    encoders = family.encoders()
    base, started_from = read_loras(config, family, adapter, transformer)

    topology = Topology.start(config.pipeline_stages)
    folder = open_run(config, args.resume, topology)
    setup_logging(folder.log_file, topology.rank)
    log.info("run %s: %d stage(s) x %d replica(s) on %s", folder.path, topology.stages, topology.replicas, topology.device.type)
    log.info("model: %s, %s; stage boundaries %s", family.variant, describe_weights(transformer), boundaries)
    if topology.is_main:
        dump_config(loaded, folder.path)
    checkpoint = load_checkpoint(folder)

    # The data, encoded.
    cache = DatasetCache(config.cache_dir or config.output_dir / "cache")
    found = topology.from_main(lambda: scan_all(loaded, family, cache))
    samples = [sample for part in found.values() for sample in part.samples]
    report = cache.build(samples, encoders, rank=topology.rank, world_size=topology.world_size, device=topology.device)
    log.info("encoded data: %s", "; ".join(report.lines()))
    if args.cache_only:
        return 0

    # The layers of this stage, with their weights.
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    everywhere = trainable_parameters(transformer)
    mine = {name: everywhere[name] for name in names_of(own, transformer) if name in everywhere}
    if checkpoint is not None:
        trained = checkpoint.weights(mine)
    else:
        trained = adapter.first_values(mine.items(), config.seed) if adapter else {}
        if started_from:
            trained |= adapter.values_from(started_from, mine.items(), config.adapter.init_from)
    fill_stage(transformer, own, base, trained, topology.device)

    # The engine around them.
    policy = RuntimePolicy(topology.device, DTYPES[config.model.dtype], config.activation_checkpointing)
    optimizer = RunOptimizer(mine, config.optimizer)
    engine = StageEngine.build(
        StageModule(layers, boundaries, topology, policy, config.seed),
        optimizer,
        family.loss,
        trainable_names=list(everywhere),
        micro_batch_size=config.micro_batch_size_per_gpu,
        accumulation=config.gradient_accumulation_steps,
        gradient_clipping=config.gradient_clipping,
    )

    # And the loop.
    order = EpochOrder(found["training"].samples, config.micro_batch_size_per_gpu, config.seed)
    log.info("%s", "\n".join(order.report(topology.replicas * config.gradient_accumulation_steps)))
    schedule = Schedule.of(config, order, topology.replicas)
    metrics = MetricLog(
        folder.path,
        enabled=topology.is_main,
        wandb=config.wandb,
        run_name=folder.path.name,
        config=public_settings(config),
        total_steps=schedule.total_steps,
        first_step=checkpoint.progress.step if checkpoint else 0,
    )
    trainer = Trainer(
        config,
        topology,
        engine=engine,
        optimizer=optimizer,
        parameters=mine,
        order=order,
        loader=BatchLoader(cache, found["training"].samples, encoders, config.num_loader_threads),
        eval_data={
            name: EvalData(part.samples, BatchLoader(cache, part.samples, encoders, config.num_loader_threads))
            for name, part in found.items()
            if name != "training"
        },
        prepare=family.prepare_inputs,
        checkpoints=CheckpointManager(folder.path, topology),
        exporter=RunExporter(
            folder.exports, folder.path.name, topology, export_writer(config, family, adapter, transformer, found["training"])
        ),
        metrics=metrics,
        record={"settings": public_settings(config)},
        checkpoint=checkpoint,
    )
    try:
        progress = trainer.train()
    finally:
        metrics.close()
    log.info("finished: %d steps, %d samples; everything is in %s", progress.step, progress.samples, folder.path)
    topology.stop()
    return 0


def scan_all(loaded: LoadedConfig, family: ModelFamily, cache: DatasetCache) -> dict[str, Scan]:
    """The training data and the held-out data sets, by name."""
    found = {}
    for name, dataset in {"training": loaded.dataset, **loaded.eval_datasets}.items():
        found[name] = scan(dataset, family.size_rules, hash_cache=cache.folder / "files.json")
        log.info("%s data:\n%s", name, "\n".join(found[name].report.lines()))
    return found


def build_layers(config: RunConfig, family: ModelFamily) -> tuple[nn.Module, list[PipelineLayer], list[int], AdapterManager | None]:
    """The transformer on meta with its adapter, its pipeline layers, and where they are cut.

    Raises UserError if the weights' names and shapes are not the model's, or if an adapter or a division does not fit.
    """
    with torch.device("meta"):
        transformer = family.build_transformer()
        expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
        if problems := check_names(family.weights(), expected):
            raise UserError(listed(problems, f"the weights do not fit {family.variant}:"))
        adapter = None
        if config.adapter is not None:
            adapter = AdapterManager(config.adapter, family.adapter_targets)
            adapter.attach(transformer)
        layers = family.layers(transformer)
    boundaries = divide(layers, config.pipeline_stages, config.partition_method, config.partition_split)
    return transformer, layers, boundaries, adapter


def read_loras(
    config: RunConfig, family: ModelFamily, adapter: AdapterManager | None, transformer: nn.Module
) -> tuple[NamedWeights, LoraFile | None]:
    """The base weights with ``merge_adapters`` added, and the LoRA that the adapter starts from.

    Raises UserError for files that do not fit.
    """
    weights = family.weights()
    modules = adaptable_modules(weights)
    merged = [(load_lora(entry.path, modules, family.key_map()), entry.weight) for entry in config.model.merge_adapters]
    if adapter is None or adapter.config.init_from is None:
        return MergedWeights(weights, merged), None
    file = load_lora(adapter.config.init_from, modules, family.key_map())
    if strange := [name for name in file.weights if name not in trainable_parameters(transformer)]:
        raise UserError(
            f"adapter.init_from = {adapter.config.init_from} has an adapter on {strange[0].partition('.lora_')[0]} and "
            f"{len(strange) // 2 - 1} more modules that adapter.target_modules leaves out; add them, or use another file"
        )
    adapter.values_from(file, trainable_parameters(transformer).items(), adapter.config.init_from)
    return MergedWeights(weights, merged), file


def export_writer(
    config: RunConfig, family: ModelFamily, adapter: AdapterManager | None, transformer: nn.Module, data: Scan
) -> WriteExport:
    """How this run's weights become a file for other programs."""
    sizes = Counter(f"{sample.bucket.width}x{sample.bucket.height}" for sample in data.samples)
    directories = Counter(sample.key.split("/")[0] for sample in data.samples)
    weights_dtype = config.adapter.dtype if config.adapter else config.model.transformer_dtype or config.model.dtype
    common = {
        "expected": {name: tuple(parameter.shape) for name, parameter in trainable_parameters(transformer).items()},
        "key_map": family.key_map(),
        "dtype": DTYPES[config.save_dtype or weights_dtype],
        "family": family.export_metadata(),
    }

    def write(folder: Path, name: str, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> Path:
        facts = TrainingFacts(
            learning_rate=config.optimizer.lr,
            seed=config.seed,
            resolution=sizes.most_common(1)[0][0],
            datasets=directories,
            **training,
        )
        if adapter is None:
            whole = {"prefix": family.full_prefix, "companions": family.companions()}
            return export_full(folder, name, weights, facts=facts, **whole, **common)
        # As alpha / rank is what every reader computes, an rsLoRA has the alpha that gives its scale.
        lora = {"fmt": family.lora_format, "alpha": adapter.scale * adapter.config.rank, "rank": adapter.config.rank}
        return export_lora(folder, name, weights, facts=facts, **lora, **common)

    return write


def public_settings(config: RunConfig) -> dict[str, Any]:
    """The settings without paths: what may stand in exported files and be sent to W&B."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items() if not isinstance(entry, Path) and entry is not None}
        if isinstance(value, (list, tuple)):
            return [clean(entry) for entry in value]
        return value

    return clean(config.model_dump(exclude={"eval_datasets", "wandb", "run_name"}))


if __name__ == "__main__":
    sys.exit(main())
