"""Train a diffusion transformer over pipeline stages.

    deepspeed train.py --config FILE        one process per GPU; the same with torchrun or srun, or bare python for one process

The run as a story: read the config, look at the data, encode it, build this rank's layers, train.
"""

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.stopping import DONE, FAILED, USER_ERROR, Stopped, Stopper, leave

# Before the slow imports: a signal that comes during them is a wish to stop like any other.
stopper = Stopper()
if __name__ == "__main__":
    stopper.listen()

from models import load_family
from models.assembly import build_layers, describe_weights, epoch_order, export_writer, learning_rates, read_loras
from models.base import ModelFamily
from models.check import PageRequest, check
from utils.adapters.manager import trainable_parameters
from utils.checkpoints.manager import CheckpointManager, Progress
from utils.checkpoints.retention import Retention
from utils.config.dump import dump_config
from utils.config.load import LoadedConfig, load_config
from utils.config.schema import RunConfig, seconds_in
from utils.data.batches.loader import BatchLoader
from utils.data.batches.workers import WorkerPool
from utils.data.cache import DatasetCache, broken_files
from utils.data.masks import MaskEncoder, has_mask
from utils.data.sources.scan import Scan, scan
from utils.data.values import Sample
from utils.errors import UserError, listed
from utils.evaluation import EvalData
from utils.formats.run_exports import RunExporter
from utils.metrics import MetricLog, setup_logging
from utils.optim.kinds import averages
from utils.optim.optimizers import RunOptimizer
from utils.optim.shares import ReplicaShares
from utils.optim.trials import couples_parameters, optimizer_problems
from utils.pipeline.engine import StageEngine, StageModule
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.requests import Requests
from utils.resume import refuse_other_weights
from utils.run import load_checkpoint, open_run
from utils.runtime import DTYPES, RuntimePolicy
from utils.saving import RunSaver
from utils.schedule import Schedule, position
from utils.topology import Topology, read_environment
from utils.trained import Trained
from utils.trainer import Trainer
from utils.watchdog import Watchdog

log = logging.getLogger("flowstage")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a diffusion transformer over pipeline stages.")
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="latest|PATH", help="continue from the newest checkpoint, or from this one"
    )
    parser.add_argument("--check", action="store_true", help="tell everything that can be known without training; exit code 0 or 2")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="the same, and write DIR/index.html, which shows the data as the model sees them"
    )
    parser.add_argument(
        "--report-items", type=items_of, default=24, metavar="N|all", help="samples of each bucket that it shows (default: 24)"
    )
    parser.add_argument("--decode", action="store_true", help="with --report: show what is in the cache, decoded by the VAE, too")
    parser.add_argument("--cache-only", action="store_true", help="encode the data and stop")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="change a key of the TOML (repeatable)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    if args.decode and not args.report:
        parser.error("--decode shows what is in the cache on the page of --report DIR; give that too")
    return args


def items_of(text: str) -> int | None:
    """The value of ``--report-items``; None: all of them."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number above 0 nor all")
    return int(text)


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
        if args.check or args.report:
            page = PageRequest(args.report, args.report_items, args.decode) if args.report else None
            return check(loaded, page, stopper.asked)
        if loaded.run.limits and loaded.run.limits.time:
            stopper.limit(seconds_in(loaded.run.limits.time))
        topology = Topology.start(loaded.run.pipeline_stages)
        with Watchdog(topology, stopper, loaded.run.limits) as watch:
            run(loaded, args, topology, watch)
        topology.stop()
        stopper.obeyed()
        return DONE
    except Stopped as stopped:
        log.info("stopped before the end: %s", stopped)
        if stopped.exit_code == DONE:
            stopper.obeyed()
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
    requests = Requests(folder.path)
    if topology.is_main:
        requests.watch(stopper)
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
    if any(map(has_mask, samples)):
        encoders.append(MaskEncoder())
    watch.safe_point("encoding")
    asked = {"on_bad_sample": "skip", "stop": lambda: bool(stopper.asked())}  # what is bad is judged below, by data set
    report = cache.build(samples, encoders, device=topology.device, topology=topology, **asked)
    log.info("encoded data: %s", "; ".join(report.lines()))
    watch.safe_point("loading the weights")
    found = without_unusable(found, report.unusable, loaded, topology)
    if args.cache_only:
        return

    # What is trained on in which order, and who reads it: forked now, the workers have none of the weights in memory.
    order = epoch_order(config, family, found["training"].samples)
    workers = WorkerPool(config.num_loader_workers)
    loaders = {name: BatchLoader(cache, part.samples, encoders, family.prepare_inputs, workers) for name, part in found.items()}
    if topology.reads_data:
        workers.start()

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
        accumulation=config.gradient_accumulation_steps,
        gradient_clipping=config.gradient_clipping,
    )

    # And the loop.
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
        loader=loaders["training"],
        eval_data={name: EvalData(part.samples, loaders[name]) for name, part in found.items() if name != "training"},
        saver=RunSaver(
            topology,
            CheckpointManager(folder.path, topology, Retention.of(config)),
            RunExporter(folder.exports, folder.path.name, topology, write_export),
            metrics,
            requests,
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
        workers.close()
    log.info("finished: %d steps, %d samples; everything is in %s", progress.step, progress.samples, folder.path)


def scan_all(loaded: LoadedConfig, family: ModelFamily, cache: DatasetCache) -> dict[str, Scan]:
    """The training data and the held-out data sets, by name."""
    found = {}
    for name, dataset in {"training": loaded.dataset, **loaded.eval_datasets}.items():
        memory = cache.folder / "files.json"
        seed = loaded.run.seed if name == "training" else None
        rules = {"hash_cache": memory, "controls": family.controls, "caption_seed": seed}
        try:
            found[name] = scan(dataset, family.size_rules, **rules, stop=stopper.asked)
        except Stopped:
            raise Stopped.by(stopper.wishes()) from None
        log.info("%s data:\n%s", name, "\n".join(found[name].report.lines()))
    return found


def without_unusable(
    found: dict[str, Scan], unusable: dict[Sample, str], loaded: LoadedConfig, topology: Topology
) -> dict[str, Scan]:
    """The data sets without samples that could not be encoded.

    Raises UserError, the same on all ranks, where they are not to be skipped, and if nothing is left of a data set.
    """
    if not unusable:
        return found
    datasets = {"training": loaded.dataset, **loaded.eval_datasets}
    lost = {name: [sample for sample in part.samples if sample in unusable] for name, part in found.items()}
    stopping = [sample for name, samples in lost.items() if datasets[name].on_bad_sample == "stop" for sample in samples]
    if stopping:
        raise broken_files(unusable[sample] for sample in stopping)
    for name, samples in lost.items():
        for sample in samples if topology.is_main else ():
            log.warning("%s data: %s is left out: %s", name, sample.key, unusable[sample])
        if len(samples) == len(found[name].samples):
            raise broken_files((unusable[sample] for sample in samples), f"nothing is left of the {name} data; repair the files:")
    return {
        name: replace(part, samples=[sample for sample in part.samples if sample not in unusable]) for name, part in found.items()
    }


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
