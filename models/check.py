"""What can be known of a run without training: ``train.py --check``, and with ``--report`` a page with pictures."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from models import load_family
from models.assembly import build_layers, describe_weights, epoch_order, learning_rates, read_loras
from models.base import ModelFamily
from models.common.latent_encoders import LatentEncoder
from utils.adapters.manager import trainable_parameters
from utils.checkpoints.checkpoint import Progress
from utils.config.dataset import DirectoryConfig
from utils.config.load import LoadedConfig
from utils.config.schema import RunConfig
from utils.data.cache import DatasetCache
from utils.data.encoders import ConditionEncoder
from utils.data.sources.scan import scan
from utils.data.values import Sample
from utils.errors import UserError
from utils.pipeline.layer import PipelineLayer
from utils.pipeline.partition import layer_weights
from utils.report.findings import DataFindings, findings_of
from utils.report.page import refuse_folder, write_page
from utils.report.tables import plain, show, summary
from utils.schedule import Schedule
from utils.topology import replicas_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageRequest:
    """What ``--report`` asks for."""

    folder: Path
    items: int | None = 24
    """Samples of each bucket that are shown; None: all."""
    decode: bool = False
    """Show what is in the cache, too."""


def check(loaded: LoadedConfig, page: PageRequest | None = None, stop: Callable[[], str] = lambda: "") -> int:
    """Tell what the run would do, and return exit code 0.  Raises UserError with what is wrong, Stopped if ``stop`` asks for it."""
    config = loaded.run
    if rank := int(os.environ["RANK"]):  # one of several processes tells it
        page = None
    if page:
        refuse_folder(page.folder)
    family = load_family(config.model.type)(config.model)
    transformer, layers, boundaries, adapter = build_layers(config, family)
    read_loras(config, family, adapter, transformer)
    encoders = family.encoders()
    model = f"{family.variant}, {describe_weights(transformer)}"
    log.info("model: %s; encoders: %s", model, ", ".join(encoder.name for encoder in encoders))
    for line in learning_rates(config).report(trainable_parameters(transformer)):
        log.info("%s", line)
    for stage in range(config.pipeline_stages):
        start, end = boundaries[stage], boundaries[stage + 1]
        weights = sum(layer_weights(layers[start:end]))
        log.info("stage %d: layers %d to %d (%s), %.3g weights", stage, start, end - 1, describe_layers(layers[start:end]), weights)
    found = look(loaded, family, encoders, stop)
    for data in found:
        if sys.stderr.isatty() and rank == 0:
            show(summary(data), Console(stderr=True))
        else:
            log.info("%s", plain(summary(data)))
    if page:
        decode = _Decoder(config, encoders) if page.decode else None
        title = f"{config.run_name}: what the model sees" if config.run_name else "What the model sees"
        file = write_page(page.folder, title, model, found, encoders=encoders, items=page.items, decode=decode, stop=stop)
        log.info("the report is in %s (%.1f MB)", file, file.stat().st_size / 1e6)
    log.info("the config is good")
    return 0


def cache_of(config: RunConfig) -> DatasetCache:
    return DatasetCache(config.cache_dir or config.output_dir / "cache")


def look(
    loaded: LoadedConfig, family: ModelFamily, encoders: Sequence[ConditionEncoder], stop: Callable[[], str]
) -> list[DataFindings]:
    """The training data, then the held-out data sets."""
    found = []
    for name, dataset in {"training": loaded.dataset, **loaded.eval_datasets}.items():
        seed = loaded.run.seed if name == "training" else None
        rules = {"hash_cache": cache_of(loaded.run).folder / "files.json", "controls": family.controls, "caption_seed": seed}
        scanned = scan(dataset, family.size_rules, **rules, stop=stop)
        folders = [folder for directory in dataset.directory for folder in folders_of(directory)]
        data = findings_of(name, scanned, family.size_rules, encoders, folders)
        found.append(with_epoch(data, loaded.run, family) if name == "training" else data)
    return found


def folders_of(directory: DirectoryConfig) -> list[Path]:
    """Where its files are, and those that belong to them."""
    beside = (directory.mask_path, directory.first_frame_path, directory.last_frame_path)
    return [directory.path, *directory.control_paths, *filter(None, beside)]


def with_epoch(data: DataFindings, config: RunConfig, family: ModelFamily) -> DataFindings:
    """The training data with what an epoch makes of them."""
    processes = int(os.environ["WORLD_SIZE"])
    replicas = replicas_for(processes, config.pipeline_stages) if processes > 1 else 1
    order = epoch_order(config, family, data.samples)
    schedule = Schedule.of(config, order, replicas, Progress())
    told = f"{schedule.steps_per_epoch} steps per epoch, {schedule.total_steps} steps in all, with {replicas} replica(s)"
    return data.trained(order, schedule.batch.micro_batches, told)


def describe_layers(layers: list[PipelineLayer]) -> str:
    kinds = [type(layer).__name__ for layer in layers]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


class _Decoder:
    """Shows what the VAE makes of cached latents.  The VAE is loaded when the first ones are found."""

    def __init__(self, config: RunConfig, encoders: Sequence[ConditionEncoder]):
        self.cache = cache_of(config)
        self.vae = next(encoder for encoder in encoders if isinstance(encoder, LatentEncoder) and encoder.reads == "pixels")
        self.device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
        self._loaded = False

    def __call__(self, sample: Sample) -> Tensor | str:
        """Pixels [3, frames, height, width] in [-1, 1], or why there are none."""
        try:
            latents = self.cache.read(sample, [self.vae])["latents"]
        except UserError:  # its text names the cache's folder, which is not for the page
            return "not in the cache yet: the run, or --cache-only, encodes it"
        if not self._loaded:
            self.vae.load(self.device)
            self._loaded = True
        try:
            return self.vae.decode(latents)
        except torch.OutOfMemoryError:
            return "the GPU's memory is not enough to decode it"
