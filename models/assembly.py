"""A run's model put together from its family and its config: layers, adapters, and how its weights become files again."""

import logging
from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import load_family
from models.base import ModelFamily
from utils.adapters.manager import AdapterManager, MergedWeights, adaptable_modules, trainable_parameters
from utils.config.schema import RunConfig
from utils.data.batches.order import EpochOrder
from utils.data.batches.sizes import BatchSizes
from utils.data.sources.scan import Scan
from utils.data.values import Sample
from utils.errors import UserError, listed
from utils.formats.adapter_files import AdapterFile, open_adapter_file, read_adapter
from utils.formats.adapter_format import UP
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter, export_full
from utils.formats.run_exports import Under, WeightsOfFiles, WriteExport
from utils.optim.rates import LearningRates
from utils.pipeline.layer import PipelineLayer
from utils.pipeline.partition import divide
from utils.runtime import DTYPES
from utils.weights.named import NamedWeights, check_names

log = logging.getLogger(__name__)


def learning_rates(config: RunConfig) -> LearningRates:
    Family = load_family(config.model.type)
    return LearningRates.of(config.optimizer, Family.parts, Family.part_lr(config.model))


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


def epoch_order(config: RunConfig, family: ModelFamily, samples: list[Sample]) -> EpochOrder:
    """The order of the training data."""
    order = EpochOrder(samples, BatchSizes.of(dict(config), family.size_rules), config.seed)
    for warning in order.warnings():
        log.warning("%s", warning)
    return order


def describe_weights(transformer: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return f"{total:.4g} weights, {trained:.4g} of them trained"


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
