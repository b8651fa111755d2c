"""The kinds of adapters: which of PEFT's it is, where it can go, and how its parts begin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from torch import nn

from utils.config.schema import AdapterConfig


@dataclass(frozen=True)
class Size:
    """How large and how strong the adapter of one module is."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Kind:
    """One kind of adapter."""

    file: str
    """What its file is: an rsLoRA is a LoRA for everyone who reads it."""
    build: Callable[..., PeftConfig]
    """(config, rank, alpha, the rest of what all of PEFT's configs take) -> PEFT's config."""
    modules: tuple[type[nn.Module], ...]
    """Modules that PEFT has a layer for."""
    zeros: tuple[str, ...]
    """The parts that are zero at the start, so that the adapter begins as nothing.  What it adds is linear in each of them, so that
    a factor on them is a factor on the adapter."""
    scale: Callable[[Size], float] = lambda size: size.alpha / size.rank
    is_bounded: bool = True
    """Whether a rank above the sides of the weight is of no use."""

    def is_zero_at_start(self, part: str) -> bool:
        """Whether ``part``, as ``lora_B.weight`` or ``lokr_w1_a``, begins as zeros."""
        return part.removesuffix(".weight") in self.zeros


def _lora(config: AdapterConfig, rank: int, alpha: float, common: Mapping[str, Any], **switches: bool) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=config.dropout, **switches, **common)


def _lycoris(
    build: Callable[..., PeftConfig], config: AdapterConfig, rank: int, alpha: float, common: Mapping[str, Any]
) -> PeftConfig:
    # PEFT leaves the module out where a draw from [0, 1) is not above the dropout: at 0 once in 2^24 times, below 0 never.
    return build(r=rank, alpha=alpha, module_dropout=-1.0, **common)


def _lokr(config: AdapterConfig, rank: int, alpha: float, common: Mapping[str, Any]) -> PeftConfig:
    return _lycoris(partial(LoKrConfig, decompose_factor=config.decompose_factor or -1), config, rank, alpha, common)


_LORA_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LYCORIS_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d)

KINDS: dict[str, Kind] = {
    "lora": Kind("lora", _lora, _LORA_MODULES, ("lora_B",)),
    # Kalajdzievski 2023, arXiv 2312.03732.
    "rslora": Kind(
        "lora", partial(_lora, use_rslora=True), _LORA_MODULES, ("lora_B",), scale=lambda size: size.alpha / size.rank**0.5
    ),
    "dora": Kind("dora", partial(_lora, use_dora=True), _LORA_MODULES, ("lora_B",)),
    "loha": Kind("loha", partial(_lycoris, LoHaConfig), _LYCORIS_MODULES, ("hada_w2_b",)),
    "lokr": Kind("lokr", _lokr, _LYCORIS_MODULES, ("lokr_w1", "lokr_w1_a"), is_bounded=False),
}
"""By ``[adapter] type``."""
