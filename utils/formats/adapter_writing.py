"""The tensors of an adapter file, and what is told of the training, from adapters by diffusers module."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from utils.formats.adapter_files import ReadWeight
from utils.formats.adapter_format import ALPHA, MAGNITUDE, SCALE, LoraFormat
from utils.formats.adapter_kinds import Adapter, problem_of, with_comfy_scale
from utils.formats.adapter_layouts import by_module, join
from utils.weights.keymap import KeyMap, ModulePlace

# Names under which interfaces show the kinds: sd-scripts' own network, and LyCORIS's with the algorithm in its arguments.
_NETWORKS = {"lora": "networks.lora", "dora": "networks.lora", "loha": "lycoris.kohya", "lokr": "lycoris.kohya"}


Placed = tuple[LoraFormat, str]
"""How a module of a file is spelt, and its path."""


def placed(
    adapters: Mapping[str, Adapter], key_map: KeyMap, fmt: LoraFormat, *, detect_shared: bool = False
) -> dict[Placed, Adapter]:
    """The adapters of a file in the format, from those of diffusers modules.  ValueError for those that it cannot hold.

    Where the format has released names there is one adapter for each module of the release, which may hold those of several modules
    of diffusers (see :func:`join`).
    """
    groups: dict[tuple[str, str], tuple[LoraFormat, ModulePlace, dict[str, Adapter]]] = {}
    found: dict[Placed, Adapter] = {}
    for module, adapter in adapters.items():
        own, path = fmt.of(module)
        if own.names == "diffusers":
            found[own, path] = adapter
        else:
            place = _released_place(module, key_map)
            groups.setdefault((own.prefix, place.path), (own, place, {}))[2][module] = adapter
    for own, place, parts in groups.values():
        try:
            found[own, place.path] = join(place, parts, key_map, detect_shared=detect_shared)
        except ValueError:
            if own.unfused is None:
                raise
            found |= {(own.unfused, module): adapter for module, adapter in parts.items()}
    return found


def file_tensors(adapters: Mapping[Placed, Adapter], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a file.  ``.alpha`` is written where the format has it or the adapter brings it along.

    ``dtype`` None: each tensor's own.  Magnitudes stay in fp32: they scale the whole weight.
    """
    tensors = {}
    for (own, path), adapter in adapters.items():
        for part, tensor in adapter.parts.items():
            cast = tensor if dtype is None or part in (SCALE, MAGNITUDE) else tensor.to(dtype)
            tensors[own.key(path, own.ending(part))] = cast
        if adapter.rank and (own.writes_alpha or adapter.alpha_dtype):
            tensors[own.key(path, ALPHA)] = _alpha(adapter.scale * adapter.rank, adapter.alpha_dtype or torch.float32)
        else:
            assert adapter.scale == 1, f"{path}: the scale {adapter.scale} would be lost"
    return tensors


def _alpha(value: float, dtype: torch.dtype) -> Tensor:
    """A number in its dtype if that holds it as well as fp32 does."""
    exact = torch.tensor(value, dtype=torch.float32)
    return exact.to(dtype) if exact.to(dtype).float() == exact else exact


def _released_place(module: str, key_map: KeyMap) -> ModulePlace:
    key = key_map.released_name(f"{module}.weight")
    modules = tuple(name.removesuffix(".weight") for name in key_map.diffusers_names(key, "released"))
    return ModulePlace(key.removesuffix(".weight"), "released", modules)


def trained_tensors(
    weights: Mapping[str, Tensor],
    scales: Mapping[str, float],
    key_map: KeyMap,
    fmt: LoraFormat,
    dtype: torch.dtype,
    base: ReadWeight | None = None,
) -> dict[str, Tensor]:
    """The file of an adapter that was trained, from its weights by canonical name: strength 1 for each reader.

    ``base`` reads the model's weights by diffusers name; a DoRA needs it where the format has ComfyUI's magnitudes.  ValueError for
    what makes no adapter or does not go into the format.
    """
    adapters = {}
    for module, names in by_module(weights).items():
        parts = {part: weights[name].detach() for part, name in names.items()}
        if problem := problem_of(parts):
            raise ValueError(f"the adapter of {module} {problem}")
        adapter = Adapter(parts, scales[module]).folded()
        own, _ = fmt.of(module)
        if MAGNITUDE in parts and own.magnitude == SCALE:
            if base is None:
                raise ValueError(f"the magnitude of {module} cannot be written in ComfyUI's form without the base weights")
            adapter = with_comfy_scale(adapter, partial(base, f"{module}.weight"))
        adapters[module] = adapter
    if len({adapter.rank for adapter in adapters.values()}) > 1:
        fmt = without_alpha(fmt)
    return file_tensors(placed(adapters, key_map, fmt), dtype)


def without_alpha(fmt: LoraFormat) -> LoraFormat:
    """The format of a file with several alphas, of which diffusers 0.42 loses those of SDXL's attention: there is none then."""
    return replace(fmt, writes_alpha=False, others={prefix: without_alpha(other) for prefix, other in fmt.others.items()})


def training_metadata(shapes: Mapping[str, Sequence[int]], scales: Mapping[str, float]) -> dict[str, str]:
    """What interfaces show of an adapter: sd-scripts' ``ss_network_*``, with the most frequent rank and alpha of the training."""
    adapters = {
        module: Adapter({part: torch.empty(tuple(shapes[name]), device="meta") for part, name in names.items()}, scales[module])
        for module, names in by_module(shapes).items()
    }
    kind = next(iter(adapters.values())).kind
    told = {"ss_network_module": _NETWORKS[kind], "flowstage.adapter": kind}
    if _NETWORKS[kind] != "networks.lora":
        told["ss_network_args"] = json.dumps({"algo": kind})
    if known := Counter((adapter.rank, adapter.scale * adapter.rank) for adapter in adapters.values() if adapter.rank):
        [((rank, alpha), _)] = known.most_common(1)
        told |= {
            "ss_network_dim": str(rank),
            "ss_network_alpha": f"{alpha:g}",
            "flowstage.strength_in_weights": f"{alpha:g}/{rank}",
        }
    return told
