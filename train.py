"""Train a diffusion transformer over pipeline stages.

    deepspeed train.py --config FILE        one process per GPU; the same with torchrun or srun, or bare python for one process

The run as a story: read the config, look at the data, encode it, build this rank's layers, train.
"""

import argparse
import logging
import os
from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.stopping import DONE, FAILED, USER_ERROR, Stopped, Stopper, leave

# Before the slow imports: a signal that comes during them is a wish to stop like any other.
stopper = Stopper()
if __name__ == "__main__":
    stopper.listen()

import torch
from torch import Tensor, nn

from models import load_family
from models.base import ModelFamily
from utils.adapters.manager import AdapterManager, MergedWeights, adaptable_modules, trainable_parameters
from utils.checkpoints.adapter_files import AdapterFile, open_adapter_file, read_adapter
from utils.checkpoints.adapter_format import UP
from utils.checkpoints.adapter_layouts import modules_of
from utils.checkpoints.export import TrainingFacts, export_adapter, export_full
from utils.checkpoints.manager import CheckpointManager, Progress
from utils.checkpoints.retention import Retention
from utils.checkpoints.run_exports import RunExporter, Under, WeightsOfFiles, WriteExport
from utils.checkpoints.weights import NamedWeights, check_names
from utils.config.dump import dump_config
from utils.config.load import LoadedConfig, load_config
from utils.config.schema import RunConfig, seconds_in
from utils.data.batches import BatchLoader, EpochOrder
from utils.data.cache import DatasetCache
from utils.data.sources import Scan, scan
from utils.errors import UserError, listed
from utils.metrics import MetricLog, setup_logging
from utils.optim.kinds import averages
from utils.optim.optimizers import RunOptimizer
from utils.optim.rates import LearningRates
from utils.optim.shares import ReplicaShares
from utils.optim.trials import couples_parameters, optimizer_problems
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.layer import PipelineLayer
from utils.pipeline.partition import divide, layer_weights
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.requests import Requests
from utils.resume import refuse_other_weights
from utils.run import load_checkpoint, open_run
from utils.runtime import DTYPES, RuntimePolicy
from utils.saving import RunSaver
from utils.schedule import Schedule, position
from utils.topology import Topology, read_environment, replicas_for
from utils.trained import Trained
from utils.trainer import EvalData, Trainer
from utils.watchdog import Watchdog

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
    """Exit code: 0 done, 2 something that the user can put right, 75 told to stop and ready to go on, 1 an accident."""
    args = parse_arguments()
    read_environment()
    rank = int(os.environ["RANK"])
    setup_logging(None, rank)
    try:
        loaded = load_config(args.config, lambda name: load_family(name).Options, args.set)
        refuse_optimizer(loaded.run)
        for notice in loaded.notices:
            log.info("%s", notice)
        if args.check:
            return check(loaded)
        if loaded.run.limits and loaded.run.limits.time:
            stopper.limit(seconds_in(loaded.run.limits.time))
        topology = Topology.start(loaded.run.pipeline_stages)
        with Watchdog(topology, stopper, loaded.run.limits) as watch:
            run(loaded, args, topology, watch)
        topology.stop()
        return DONE
    except Stopped as stopped:
        log.info("stopped before the end: %s", stopped)
        return stopped.exit_code
    except UserError as error:
        # Before the ranks have met, each of them finds the same; later most errors are one rank's own.
        if rank == 0 or (Topology.is_started() and not error.everywhere):
            log.error("%s", error)
        return USER_ERROR
    except Exception:
        log.exception("the run failed")
        return FAILED


def refuse_optimizer(config: RunConfig) -> None:
    """Raises UserError for an optimizer that cannot serve this run."""
    if problems := optimizer_problems(config.optimizer):
        raise UserError(listed(problems, "the optimizer cannot be used:"))
    rates = learning_rates(config)
    if couples_parameters(config.optimizer):
        problems = []
        if config.pipeline_stages > 1:
            problems.append(f"pipeline_stages = {config.pipeline_stages} would give each stage another value; use 1")
        if config.optimizer.zero:
            problems.append("optimizer.zero = 1 would give each replica another value; use 0")
        if any(rates.by_part.values()):
            problems.append("learning rates by part would give each part another value; only 0, which freezes a part, can be used")
        if problems:
            heading = f"optimizer.type = {config.optimizer.type!r} computes one value from all parameters; use another one, or:"
            raise UserError(listed(problems, heading))
    if config.ema and averages(config.optimizer):
        raise UserError(f"[ema]: optimizer.type = {config.optimizer.type!r} averages the weights by itself; remove one of them")


def learning_rates(config: RunConfig) -> LearningRates:
    Family = load_family(config.model.type)
    return LearningRates.of(config.optimizer, Family.parts, Family.part_lr(config.model))


# ── what can be known without training ────────────────────────────────────────────────────────────────────────────────────


def check(loaded: LoadedConfig) -> int:
    """Log what the run would do.  Raises UserError with what is wrong."""
    config = loaded.run
    family = load_family(config.model.type)(config.model)
    transformer, layers, boundaries, adapter = build_layers(config, family)
    read_loras(config, family, adapter, transformer)
    encoders = family.encoders()
    processes = int(os.environ["WORLD_SIZE"])
    replicas = replicas_for(processes, config.pipeline_stages) if processes > 1 else 1
    log.info("model: %s, %s; encoders: %s", family.variant, describe_weights(transformer), ", ".join(e.name for e in encoders))
    for line in learning_rates(config).report(trainable_parameters(transformer)):
        log.info("%s", line)
    for stage in range(config.pipeline_stages):
        start, stop = boundaries[stage], boundaries[stage + 1]
        weights = sum(layer_weights(layers[start:stop]))
        log.info(
            "stage %d: layers %d to %d (%s), %.3g weights", stage, start, stop - 1, describe_layers(layers[start:stop]), weights
        )
    for name, dataset in {"training": loaded.dataset, **loaded.eval_datasets}.items():
        seed = config.seed if name == "training" else None
        found = scan(dataset, family.size_rules, hash_cache=None, controls=family.controls, caption_seed=seed)
        log.info("%s data:\n%s", name, "\n".join(found.report.lines()))
        if name == "training":
            order = EpochOrder(found.samples, config.micro_batch_size_per_gpu, config.seed)
            schedule = Schedule.of(config, order, replicas, Progress())
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


def run(loaded: LoadedConfig, args: argparse.Namespace, topology: Topology, watch: Watchdog) -> None:
    """Train.  Raises Stopped if the ranks agreed to stop before the end."""
    config = loaded.run
    # The model without its weights: names, shapes, layers, stages.  What does not fit is found before anything takes time.
    family = load_family(config.model.type)(config.model)
    transformer, layers, boundaries, adapter = build_layers(config, family)
    base, started_from = read_loras(config, family, adapter, transformer)
    encoders = family.encoders()

    record = {"settings": public_settings(config), "variant": family.variant}
    everywhere = trainable_parameters(transformer)
    folder = open_run(config, args.resume, topology, lambda found: refuse_other_weights(found, record, everywhere))
    setup_logging(folder.log_file, topology.rank)
    watch.folder = folder.path
    log.info("run %s: %d stage(s) x %d replica(s) on %s", folder.path, topology.stages, topology.replicas, topology.device.type)
    log.info("model: %s, %s; stage boundaries %s", family.variant, describe_weights(transformer), boundaries)
    rates = learning_rates(config)
    for line in rates.report(everywhere):
        log.info("%s", line)
    if topology.is_main:
        dump_config(loaded, folder.path)
    checkpoint = load_checkpoint(folder)

    # The data, encoded.
    watch.safe_point("the look at the data")
    cache = DatasetCache(config.cache_dir or config.output_dir / "cache")
    found = topology.from_main(lambda: scan_all(loaded, family, cache))
    samples = [sample for part in found.values() for sample in part.samples]
    watch.safe_point("encoding")
    share = {"rank": topology.rank, "world_size": topology.world_size, "device": topology.device}
    report = cache.build(samples, encoders, **share, stop=lambda: bool(stopper.asked()))
    log.info("encoded data: %s", "; ".join(report.lines()))
    watch.safe_point("loading the weights")
    if args.cache_only:
        return

    # The layers of this stage, with their weights.
    own = layers[boundaries[topology.stage] : boundaries[topology.stage + 1]]
    mine = {name: everywhere[name] for name in names_of(own, transformer) if name in everywhere}
    if checkpoint is not None:
        trained = checkpoint.weights(mine)
    else:
        trained = adapter.first_values(mine.items(), config.seed, base) if adapter else {}
        for path, file in started_from.items():
            trained |= adapter.values_from(file, mine.items(), path)
    fill_stage(transformer, own, base, trained, topology.device)
    watch.safe_point("the start of training")

    # The engine around them.
    policy = RuntimePolicy(topology.device, DTYPES[config.model.dtype], config.activation_checkpointing)
    if config.optimizer.zero and topology.replicas == 1:
        log.warning("optimizer.zero = 1 has no effect: there is one replica, which keeps the whole state")
    shares = ReplicaShares(mine, topology) if config.optimizer.zero else None
    optimizer = RunOptimizer(mine, config.optimizer, rates.rate, shares)
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
    progress = position(checkpoint.progress, order) if checkpoint else Progress()
    schedule = Schedule.of(config, order, topology.replicas, progress)
    metrics = MetricLog(
        folder.path,
        enabled=topology.is_main,
        wandb=config.wandb,
        run_name=folder.path.name,
        config=public_settings(config),
        total_steps=schedule.total_steps,
        first_step=progress.step,
    )
    write_export = export_writer(config, family, adapter, transformer, base, found["training"])
    trainer = Trainer(
        config,
        topology,
        engine=engine,
        trained=Trained(mine, optimizer, config.ema, topology, checkpoint),
        rates=rates,
        order=order,
        loader=BatchLoader(cache, found["training"].samples, encoders, config.num_loader_threads),
        eval_data={
            name: EvalData(part.samples, BatchLoader(cache, part.samples, encoders, config.num_loader_threads))
            for name, part in found.items()
            if name != "training"
        },
        prepare=family.prepare_inputs,
        saver=RunSaver(
            topology,
            CheckpointManager(folder.path, topology, Retention.of(config)),
            RunExporter(folder.exports, folder.path.name, topology, write_export),
            metrics,
            Requests(folder.path),
        ),
        metrics=metrics,
        stopper=stopper,
        watch=watch,
        record=record,
        progress=progress,
        checkpoint=checkpoint,
    )
    try:
        progress = trainer.train()
    finally:
        metrics.close()
    log.info("finished: %d steps, %d samples; everything is in %s", progress.step, progress.samples, folder.path)


def scan_all(loaded: LoadedConfig, family: ModelFamily, cache: DatasetCache) -> dict[str, Scan]:
    """The training data and the held-out data sets, by name."""
    found = {}
    for name, dataset in {"training": loaded.dataset, **loaded.eval_datasets}.items():
        memory = cache.folder / "files.json"
        seed = loaded.run.seed if name == "training" else None
        found[name] = scan(
            dataset, family.size_rules, hash_cache=memory, controls=family.controls, caption_seed=seed, stop=stopper.asked
        )
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
        adapter, rates = None, learning_rates(config)
        if config.adapter is not None:
            adapter = AdapterManager(config.adapter, family.adapter_targets, rates.freezes)
            adapter.attach(transformer)
            for file in family.export_files().values():
                modules = modules_of(Under(file.prefix, trainable_parameters(transformer)))
                if not modules:
                    raise UserError(
                        f"adapter.target_modules matches nothing below {file.prefix!r}, which is exported as a file of its own; "
                        "add modules of it, or leave it out of the run in [model]"
                    )
                adapter.refuse_unwritable(modules, family.key_map(), family.lora_format)
        rates.freeze(transformer)
        layers = family.layers(transformer)
    boundaries = divide(layers, config.pipeline_stages, config.partition_method, config.partition_split)
    return transformer, layers, boundaries, adapter


def read_loras(
    config: RunConfig, family: ModelFamily, adapter: AdapterManager | None, transformer: nn.Module
) -> tuple[NamedWeights, dict[Path, AdapterFile]]:
    """The base weights with ``merge_adapters`` added, to the family's encoders too, and the files that the adapter starts from.

    Raises UserError for files that do not fit.
    """
    weights = MergedWeights(family.adaptable_weights())
    for entry in config.model.merge_adapters:
        weights = weights.with_adapter(read_lora(entry.path, family, weights), entry.weight)
    family.take_merged(weights, weights.merged)
    started_from: dict[Path, AdapterFile] = {}
    trained = trainable_parameters(transformer)
    given = adapter.config.init_from if adapter else None
    for path in given if isinstance(given, list) else [given] if given else []:
        file = started_from[path] = read_lora(path, family, weights)
        # Of another kind no name would fit: that is said first.
        adapter.values_from(file, trained.items(), path)
        others = modules_of(name for name in file.weights if name not in trained)
        # Other trainers write adapters of layers that a model does not use, too; these were never changed.
        if strange := [module for module in others if file.kind != "lora" or file.weights[f"{module}.{UP}"].any()]:
            raise UserError(
                f"adapter.init_from = {path} has an adapter on {strange[0]} and {len(strange) - 1} more modules that this run does "
                "not train: adapter.target_modules leaves them out, or [model] keeps their network frozen; change that, or use "
                "another file"
            )
        if both := [other for other in started_from if other != path and started_from[other].weights.keys() & file.weights.keys()]:
            raise UserError(f"adapter.init_from: {both[0]} and {path} are of the same modules; name one of them")
    return weights, started_from


def read_lora(path: Path, family: ModelFamily, weights: NamedWeights) -> AdapterFile:
    """An adapter of ``weights`` by the names of the run's model, of which the file may be for a part."""
    prefix = family.export_files()[family.export_file_of(path, open_adapter_file(path).metadata)].prefix
    modules = [name.removeprefix(prefix) for name in adaptable_modules(weights) if name.startswith(prefix)]
    file = read_adapter(path, modules, family.key_map(), base=lambda name: weights.read(prefix + name))
    values, scales = ({prefix + name: value for name, value in values.items()} for values in (file.weights, file.scales))
    return replace(file, weights=values, scales=scales)


def export_writer(
    config: RunConfig, family: ModelFamily, adapter: AdapterManager | None, transformer: nn.Module, base: NamedWeights, data: Scan
) -> WriteExport:
    """How this run's weights become a file for other programs.  ``base``: the model's weights without what was trained."""
    sizes = Counter(f"{sample.bucket.width}x{sample.bucket.height}" for sample in data.samples)
    directories = Counter(sample.key.split("/")[0] for sample in data.samples)
    weights_dtype = config.adapter.dtype if config.adapter else config.model.transformer_dtype or config.model.dtype
    trained = trainable_parameters(transformer)
    frozen = {} if adapter else {n: p for n, p in transformer.named_parameters() if n not in trained}
    shapes = {name: tuple(parameter.shape) for name, parameter in {**trained, **frozen}.items()}
    base_weights = WeightsOfFiles(base, base.names())
    common = {
        "key_map": family.key_map(),
        "dtype": DTYPES[config.save_dtype or weights_dtype],
    }

    def write(folder: Path, name: str, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> None:
        facts = TrainingFacts(
            learning_rate=config.optimizer.lr,
            seed=config.seed,
            resolution=sizes.most_common(1)[0][0],
            datasets=directories,
            **training,
        )
        for suffix, file in family.export_files().items():
            own = {"weights": Under(file.prefix, weights), "expected": Under(file.prefix, shapes), "family": file.metadata}
            if adapter is None:
                own["weights"] = Under(file.prefix, ChainMap(weights, WeightsOfFiles(base, frozen)))
                whole = {**common, "key_map": family.full_key_map(), "companions": family.companions()}
                export_full(folder, name + suffix, facts=facts, **own, **whole)
            else:
                scales = {module: adapter.scale_of(file.prefix + module) for module in modules_of(own["expected"])}
                lora = {"fmt": family.lora_format, "scales": scales, "base": Under(file.prefix, base_weights).__getitem__}
                export_adapter(folder, name + suffix, facts=facts, **own, **lora, **common)

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
    leave(main())
