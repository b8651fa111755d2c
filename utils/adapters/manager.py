"""Adapters: PEFT makes the layers; names, first values and what is saved are decided here."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from utils.adapters.deltas import adapted, row_norms
from utils.adapters.dora import measure_rows_exactly
from utils.adapters.kinds import KINDS, Size
from utils.adapters.targets import select, size_of
from utils.config.schema import AdapterConfig
from utils.draw import generator
from utils.errors import UserError
from utils.formats.adapter_files import AdapterFile
from utils.formats.adapter_format import MAGNITUDE, LoraFormat
from utils.formats.adapter_layouts import module_of, unwritable
from utils.runtime import DTYPES
from utils.weights.keymap import KeyMap
from utils.weights.named import NamedWeights, canonical_name
from utils.weights.tensor_files import TensorInfo

log = logging.getLogger(__name__)


class AdapterManager:
    """The adapter of one run on one transformer.

    ``default_targets``: the family's, for a config without.  ``frozen``: whether a module of this name is in a part of the model
    that is not to be trained, so that it gets no adapter.
    """

    def __init__(self, config: AdapterConfig, default_targets: str, frozen: Callable[[str], bool] = lambda name: False):
        self.config, self.default_targets, self.frozen = config, default_targets, frozen
        self.kind = KINDS[config.type]
        self._weight_dtypes: dict[str, torch.dtype] = {}
        """Of the modules that have an adapter."""

    def target_names(self, transformer: nn.Module) -> list[str]:
        """Diffusers names of the modules that get an adapter, in the model's order.  UserError for what does not fit the model."""
        return select(self.config, self.default_targets, dict(transformer.named_modules()), self.frozen)

    def size_of(self, module: str) -> Size:
        """Rank and alpha of the adapter of ``module``."""
        return size_of(self.config, module)

    def scale_of(self, module: str) -> float:
        """What the adapter of ``module`` is multiplied by."""
        return self.kind.scale(self.size_of(module))

    def refuse_unwritable(self, modules: Iterable[str], key_map: KeyMap, fmt: LoraFormat) -> None:
        """Raises UserError if adapters of these modules, which go into one file, cannot be written as ``fmt`` spells them."""
        if not (wrong := unwritable(list(modules), self.kind.file, key_map, fmt)):
            return
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        add = ", give one to all modules that they share a weight with" if self.config.type == "dora" else ""
        raise UserError(
            f'adapter.type = "{self.config.type}" on {wrong[0]}{more}: the model\'s files hold these in one weight with other '
            "modules, or with rows in another order, where an adapter of this kind cannot be written; leave them out with "
            f'adapter.exclude_modules{add}, or set adapter.type = "lora"'
        )

    def attach(self, transformer: nn.Module) -> None:
        """Wrap the targets (on meta too), freeze everything else."""
        transformer.requires_grad_(False)
        names = self.target_names(transformer)
        self._weight_dtypes |= {name: transformer.get_submodule(name).weight.dtype for name in names}
        sizes = {name: self.size_of(name) for name in names}
        common = {
            # The names themselves: PEFT takes list entries as endings, so a pattern of exact names is the only unambiguous form.
            "target_modules": _exactly(names),
            "rank_pattern": {_exactly(same): rank for rank, same in _grouped({n: s.rank for n, s in sizes.items()}).items()},
            "alpha_pattern": {_exactly(same): alpha for alpha, same in _grouped({n: s.alpha for n, s in sizes.items()}).items()},
        }
        first = sizes[names[0]]
        inject_adapter_in_model(self.kind.build(self.config, first.rank, first.alpha, common), transformer, low_cpu_mem_usage=True)
        dtype = DTYPES[self.config.dtype]
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        measure_rows_exactly(transformer)
        ranks = sorted({size.rank for size in sizes.values()})
        log.info("adapter: %s of rank %s on %d modules", self.config.type, ", ".join(map(str, ranks)), len(names))

    def first_values(self, names: Iterable[tuple[str, Tensor]], seed: int, base: NamedWeights | None = None) -> dict[str, Tensor]:
        """Start values by canonical name, PEFT's: one factor of each adapter zero, the others uniform as for a linear layer.

        Each depends on the seed and its own name alone, so it is the same on whatever stage it is made.  The magnitudes of a DoRA
        are the lengths of the rows of ``base``, which other kinds do not need.
        """
        values = {}
        for name, like in names:
            module, part = _module_and_part(name)
            if part == MAGNITUDE:
                assert base is not None, "the magnitudes of a DoRA begin as the weights' own"
                # The weight as it will be held: rounded before it is measured, as the layer does it.
                weight = base.read(f"{module}.weight").to(self._weight_dtypes[module])
                values[name] = row_norms(weight.float()).view(like.shape)
            elif self.kind.is_zero_at_start(part):
                values[name] = torch.zeros(like.shape, dtype=like.dtype)
            else:
                # Kaiming uniform with a = sqrt(5): the bound is 1 / sqrt(fan_in).
                bound = 1 / math.sqrt(math.prod(like.shape[1:]))
                uniform = torch.rand(like.shape, generator=generator(seed, "adapter", name), dtype=torch.float32)
                values[name] = ((2 * uniform - 1) * bound).to(like.dtype)
        return values

    def values_from(self, file: AdapterFile, names: Iterable[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
        """Start values from an adapter that was read, for those of ``names`` that it has; what it computes is what ours computes.

        Raises UserError if it is of another kind or rank.
        """
        heading = f"adapter.init_from = {path}"
        if file.kind != self.kind.file:
            raise UserError(f"{heading} is a {file.kind}, adapter.type = {self.config.type!r}; set adapter.type to the file's kind")
        wanted = dict(names)
        values = {}
        for name, like in wanted.items():
            module, part = _module_and_part(name)
            if module not in file.scales:
                continue
            if name not in file.weights or not _same_shape(file.weights[name], like):
                raise UserError(f"{heading} {self._misfit(module, file, name, like)}")
            factor = file.scales[module] / self.scale_of(module) if self.kind.is_zero_at_start(part) else 1.0
            values[name] = (file.weights[name].float() * factor).to(like.dtype).view(like.shape)
        modules = {module_of(name) for name in values}
        if more := [name for name in file.weights if name not in wanted and module_of(name) in modules]:
            raise UserError(f"{heading} has {more[0]}, a part that an adapter of type {self.config.type!r} does not have here")
        return values

    def _misfit(self, module: str, file: AdapterFile, name: str, like: Tensor) -> str:
        """How the file's adapter of ``module`` differs from ours, which has ``name`` of another shape or alone."""
        down = file.weights.get(f"{module}.lora_A.weight")
        rank = self.size_of(module).rank
        if down is not None and len(down) != rank:
            return f"has rank {len(down)} for {module}, adapter.rank = {rank}; set adapter.rank to the file's"
        found = f"of {list(file.weights[name].shape)}" if name in file.weights else "not there"
        return (
            f"does not fit: {name} should be of {list(like.shape)} and is {found}; set adapter.rank"
            f"{' and adapter.decompose_factor' if self.config.type == 'lokr' else ''} to the file's"
        )


def _same_shape(one: Tensor, other: Tensor) -> bool:
    """Whether these are the same but for a kernel of 1x1, which some files write for linear layers."""
    return [size for size in one.shape if size > 1] == [size for size in other.shape if size > 1]


def _exactly(names: Iterable[str]) -> str:
    return f"^({'|'.join(re.escape(name) for name in names)})"


def _grouped(values: Mapping[str, float]) -> dict[float, list[str]]:
    """The names by their value."""
    groups: dict[float, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups


def _module_and_part(name: str) -> tuple[str, str]:
    """``blocks.0.to_q.lora_A.weight`` -> ``blocks.0.to_q``, ``lora_A.weight``."""
    module = module_of(name)
    return module, name.removeprefix(f"{module}.")


class MergedWeights:
    """A model's weights with adapters added, one after the other in fp32, and rounded once to the weight's dtype."""

    def __init__(self, base: NamedWeights, merged: Iterable[tuple[AdapterFile, float]] = ()):
        self.base, self.merged = base, list(merged)
        self._parts = [_parts_by_module(file) for file, _ in self.merged]

    def with_adapter(self, file: AdapterFile, strength: float) -> "MergedWeights":
        """These weights with one adapter more."""
        return MergedWeights(self.base, [*self.merged, (file, strength)])

    def names(self) -> Mapping[str, TensorInfo]:
        return self.base.names()

    def read(self, name: str) -> Tensor:
        value = self.base.read(name)
        module = name.removesuffix(".weight")
        changes = [
            (file, parts[module], weight)
            for (file, weight), parts in zip(self.merged, self._parts, strict=True)
            if name.endswith(".weight") and module in parts
        ]
        changed = value.float() if changes else value
        for file, parts, strength in changes:
            changed = adapted(changed, file.kind, parts, file.scales[module], strength)
        return changed.to(value.dtype)


def _parts_by_module(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in file.weights.items():
        module, part = _module_and_part(name)
        parts.setdefault(module, {})[part] = value
    return parts


def adaptable_modules(weights: NamedWeights) -> list[str]:
    """Modules of a model that a LoRA may be on: those with a weight of two dimensions or more."""
    return [
        name.removesuffix(".weight") for name, info in weights.names().items() if name.endswith(".weight") and len(info.shape) > 1
    ]


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, of the whole model; those of other stages are on meta."""
    return {canonical_name(name): parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
