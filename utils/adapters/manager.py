"""Adapters: PEFT makes the layers; names, first values and what is saved are decided here."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from utils.checkpoints.export import LoraFile
from utils.checkpoints.tensor_files import TensorInfo
from utils.checkpoints.weights import NamedWeights, canonical_name
from utils.config.schema import AdapterConfig
from utils.draw import generator
from utils.errors import UserError
from utils.runtime import DTYPES

log = logging.getLogger(__name__)

# Modules that PEFT can put a LoRA on without more settings.
_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _matches(patterns: str | list[str], name: str) -> bool:
    """A string is a regular expression for the whole name, a list holds name endings (as PEFT reads them)."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


class AdapterManager:
    """The adapter of one run on one transformer."""

    def __init__(self, config: AdapterConfig, default_targets: str):
        self.config = config
        self.targets = config.target_modules or default_targets
        self.alpha = config.rank if config.alpha is None else config.alpha
        # rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
        self.scale = self.alpha / (math.sqrt(config.rank) if config.type == "rslora" else config.rank)

    def target_names(self, transformer: nn.Module) -> list[str]:
        """Diffusers names of the modules that get an adapter, in the model's order.

        Raises UserError if a pattern is not a regular expression, matches nothing, or hits a module that cannot have one.
        """
        modules = dict(transformer.named_modules())
        excluded = self.config.exclude_modules
        try:
            hits = [name for name in modules if _matches(self.targets, name) and not (excluded and _matches(excluded, name))]
        except re.error as error:
            raise UserError(f"adapter: {error.pattern!r} is not a regular expression: {error}") from None
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not hits:
            raise UserError(
                f"adapter.target_modules = {self.targets!r} matches no module of the model; its linear modules are named like "
                f"{', '.join(linear[len(linear) // 2 : len(linear) // 2 + 4])}"
            )
        wrong = [name for name in hits if not isinstance(modules[name], _ADAPTABLE)]
        if wrong:
            raise UserError(
                f"adapter.target_modules = {self.targets!r} matches {wrong[0]!r}, a {type(modules[wrong[0]]).__name__}; "
                "an adapter goes on linear and convolution modules only"
            )
        return hits

    def attach(self, transformer: nn.Module) -> None:
        """Wrap the targets (on meta too), freeze everything else."""
        transformer.requires_grad_(False)
        names = self.target_names(transformer)
        peft_config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.config.dropout,
            use_rslora=self.config.type == "rslora",
            # The names themselves: PEFT takes list entries as endings, so a pattern of exact names is the only unambiguous form.
            target_modules="|".join(re.escape(name) for name in names),
        )
        inject_adapter_in_model(peft_config, transformer, low_cpu_mem_usage=True)
        dtype = DTYPES[self.config.dtype]
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        log.info("adapter: %s of rank %d on %d modules", self.config.type, self.config.rank, len(names))

    def first_values(self, names: Iterable[tuple[str, Tensor]], seed: int) -> dict[str, Tensor]:
        """Start values by canonical name: A uniform as for a linear layer (Hu et al. 2021, as PEFT does it), B zero.

        Each depends on the seed and its own name alone, so it is the same on whatever stage it is made.
        """
        values = {}
        for name, like in names:
            if ".lora_B." in name:
                values[name] = torch.zeros(like.shape, dtype=like.dtype)
            else:
                # Kaiming uniform with a = sqrt(5): the bound is 1 / sqrt(fan_in).
                bound = 1 / math.sqrt(math.prod(like.shape[1:]))
                uniform = torch.rand(like.shape, generator=generator(seed, "adapter", name), dtype=torch.float32)
                values[name] = ((2 * uniform - 1) * bound).to(like.dtype)
        return values

    def values_from(self, file: LoraFile, names: Iterable[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
        """Start values from a LoRA that was read, for those of ``names`` that it has; what it computes is what ours computes.

        Raises UserError if it has another rank, or modules that this adapter does not have.
        """
        wanted = dict(names)
        ranks = {name: value.shape[0] for name, value in file.weights.items() if ".lora_A." in name}
        if wrong := [name for name, rank in ranks.items() if rank != self.config.rank]:
            raise UserError(
                f"adapter.init_from = {path} has rank {ranks[wrong[0]]}, adapter.rank = {self.config.rank}; "
                "set adapter.rank to the file's"
            )
        values = {}
        for name, like in wanted.items():
            if name in file.weights:
                module = name.partition(".lora_")[0]
                factor = file.scales[module] / self.scale if ".lora_B." in name else 1.0
                values[name] = (file.weights[name].float() * factor).to(like.dtype)
        return values


class MergedWeights:
    """A model's weights with LoRAs added: W + weight * scale * B A, computed in fp32 and rounded once to the weight's dtype."""

    def __init__(self, base: NamedWeights, merged: Iterable[tuple[LoraFile, float]]):
        self.base, self.merged = base, list(merged)

    def names(self) -> Mapping[str, TensorInfo]:
        return self.base.names()

    def read(self, name: str) -> Tensor:
        value = self.base.read(name)
        module = name.removesuffix(".weight")
        for file, weight in self.merged:
            if name.endswith(".weight") and module in file.scales:
                down, up = (file.weights[f"{module}.lora_{side}.weight"].float() for side in "AB")
                delta = (up.flatten(1) @ down.flatten(1)).view(value.shape)
                value = (value.float() + weight * file.scales[module] * delta).to(value.dtype)
        return value


def adaptable_modules(weights: NamedWeights) -> list[str]:
    """Modules of a model that a LoRA may be on: those with a weight of two dimensions or more."""
    return [
        name.removesuffix(".weight") for name, info in weights.names().items() if name.endswith(".weight") and len(info.shape) > 1
    ]


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, of the whole model; those of other stages are on meta."""
    return {canonical_name(name): parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
