"""PEFT's configs, beside a file of PEFT or in the metadata of one of diffusers: they tell the strength where no ``.alpha`` does."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from utils.errors import UserError
from utils.formats.adapter_kinds import Adapter, factor_shapes
from utils.weights.tensor_files import SafetensorsFile

DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""The key under which diffusers saves PEFT's config in the file's metadata."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
_KERNEL = 9
"""Of a convolution over 3 x 3."""
_TYPES = {"lora": "LORA", "dora": "LORA", "loha": "LOHA", "lokr": "LOKR"}


def peft_configs(file: SafetensorsFile) -> dict[str, dict[str, Any]]:
    """PEFT's configs by the prefix of the keys that they are for.  UserError for one that cannot be read."""
    beside = file.path.with_name(PEFT_CONFIG)
    try:
        if DIFFUSERS_CONFIG in file.metadata:
            configs: dict[str, dict[str, Any]] = {}
            for key, value in json.loads(file.metadata[DIFFUSERS_CONFIG]).items():
                # A pipeline puts the network's name before its settings and its keys, a network alone has neither.
                network, dot, setting = key.rpartition(".")
                configs.setdefault(network + dot, {})[setting] = value
            return configs
        if file.path.name == PEFT_FILE and beside.is_file():
            return {PEFT_PREFIX: dict(json.loads(beside.read_text()))}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file.path}: its PEFT config, which tells the strength, cannot be read: {error}") from error
    return {}


def config_scale(configs: Mapping[str, dict[str, Any]], spelling: str, rank: int | None) -> float:
    """alpha / rank as PEFT computes it (a pattern stands for the end of a module's path); 1 for a key that no config is for."""
    prefix = next((prefix for prefix in configs if spelling.startswith(prefix)), None)
    if prefix is None:
        return 1.0
    config, module = configs[prefix], spelling.removeprefix(prefix)

    def setting(patterns: str, default: float) -> float:
        told = (config.get(patterns) or {}).items()
        return next((value for pattern, value in told if re.fullmatch(rf"(.*\.)?({pattern})", module)), default)

    divisor = rank or setting("rank_pattern", config.get("r") or 1)
    alpha = setting("alpha_pattern", config.get("lora_alpha", config.get("alpha", divisor)))
    return alpha / (math.sqrt(divisor) if config.get("use_rslora") else divisor)


def peft_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """``adapter_config.json`` for adapters of scale 1, by diffusers module.  ValueError for what one config cannot say."""
    kinds = {adapter.kind for adapter in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(f"PEFT's files hold one kind of adapter; this one has {', '.join(sorted(kinds))}")
    [kind] = kinds
    ranks = {module: adapter.rank or max(factor_shapes(adapter.parts)[1]) for module, adapter in adapters.items()}
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    # PEFT takes a name for the end of a path, and a path's end may be another module's name.
    others = {f"^{re.escape(module)}": other for module, other in ranks.items() if other != rank}
    config = {
        "peft_type": _TYPES[kind],
        "target_modules": "|".join(re.escape(module) for module in adapters),
        "r": rank,
        "lora_alpha" if kind in ("lora", "dora") else "alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "inference_mode": True,
    }
    tensors = {part for adapter in adapters.values() for part in adapter.parts}
    if kind in ("lora", "dora"):
        return config | {"use_dora": kind == "dora", "bias": "none"}
    if kind == "lokr":
        config |= {"decompose_both": "lokr_w1_a" in tensors, "decompose_factor": _factor(adapters.values())}
    return config | {"use_effective_conv2d": bool(tensors & {"hada_t1", "lokr_t2"})}


def _factor(adapters: Iterable[Adapter]) -> int:
    """The ``decompose_factor`` with which PEFT divides all weights as these LoKrs do."""
    pairs: set[tuple[int, tuple[int, ...]]] = set()
    for adapter in adapters:
        (rows, columns), (other_rows, other_columns) = factor_shapes(adapter.parts)
        # A convolution's second factor of low rank has the kernel in its columns, and the tensors do not tell its size.
        inner = {
            other_columns,
            other_columns // _KERNEL if other_columns % _KERNEL == 0 and "lokr_w2_b" in adapter.parts else other_columns,
        }
        pairs |= {(rows, (rows * other_rows,)), (columns, tuple(sorted(columns * size for size in inner)))}
    for factor in (*sorted({left for left, _ in pairs}), -1):
        if all(any(_left_factor(whole, factor) == left for whole in wholes) for left, wholes in pairs):
            return factor
    raise ValueError("PEFT divides no weights into factors as this LoKr has them")


def _left_factor(size: int, factor: int) -> int:
    """The first of the two numbers that PEFT writes ``size`` as a product of (``peft/tuners/lokr/layer.py``, ``factorization``)."""
    if factor > 0 and size % factor == 0:
        return factor
    limit = min(math.isqrt(size), factor if factor > 0 else size)
    return max(number for number in range(1, limit + 1) if size % number == 0)
