"""Adapters of diffusers modules as a release has them and back: modules that it holds as one, and rows that it moves.

Released q, k and v are one weight.  LoRAs of its parts become one whose A are one below the other and whose B is block-diagonal: n
adapters of rank r become one of rank n r that computes the same.  A LoRA that was trained on the whole becomes three that share A.
Magnitudes go by rows.  A LoHa of the whole becomes three that share its columns' factors, but three of their own cannot become one;
a LoKr is a product of its whole and can be neither divided nor put together.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils.formats.adapter_format import DOWN, MAGNITUDE, SCALE, UP, Kind, LoraFormat
from utils.formats.adapter_kinds import Adapter
from utils.weights.keymap import KeyMap, ModulePlace, Source

_ROW_PARTS = (UP, SCALE, "hada_w1_a", "hada_w2_a")
_COLUMN_PARTS = {"lora": (DOWN,), "dora": (DOWN,), "loha": ("hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2")}
"""What the adapters of a fused module's parts share if they were one."""


def split(place: ModulePlace, adapter: Adapter, key_map: KeyMap) -> dict[str, Adapter]:
    """The adapter of a place in a file as those of diffusers modules.  ValueError for one that cannot be divided.

    A LoRA that was put together from LoRAs of the parts is taken apart, so that each part has its own rank again and one without
    any has none.
    """
    sources = {module: key_map.sources_of(f"{module}.weight", place.layout) for module in place.modules}
    if all(_is_plain(source) for source in sources.values()):
        return dict.fromkeys(place.modules, adapter)
    _refuse_undividable(adapter, place.path, fused=len(sources) > 1)
    parts = {module: _with_rows(adapter, source.take) for module, source in sources.items()}
    if adapter.base_kind != "lora" or len(parts) == 1:
        return parts
    own = _own_columns([part.parts[UP] for part in parts.values()])
    return {
        module: replace(part, parts={**part.parts, DOWN: part.parts[DOWN][columns], UP: part.parts[UP][:, columns]})
        for (module, part), columns in zip(parts.items(), own, strict=True)
        if columns is not None
    }


def join(place: ModulePlace, adapters: Mapping[str, Adapter], key_map: KeyMap, *, detect_shared: bool = False) -> Adapter:
    """The adapter for a released module, from those of diffusers modules that it is made of; one without any keeps its rows.

    ``detect_shared``: adapters with equal factors of the columns are what :func:`split` made of one, and become that one again.
    ValueError for those that cannot become one.
    """
    present = {module: adapters[module] for module in place.modules if module in adapters}
    first = next(iter(present.values()))
    if len(place.modules) == 1:
        [module] = place.modules
        if _is_plain(key_map.sources_of(f"{module}.weight", "released")):
            return first
        _refuse_undividable(first, place.path, fused=False)
        return _with_rows(first, lambda rows: _released(key_map, {module: rows}))
    kind = first.kind
    shared = kind in _COLUMN_PARTS and detect_shared and len(present) == len(place.modules) and _share_columns(present, kind)
    if shared:
        joined = {
            part: _released(key_map, {module: adapter.parts[part] for module, adapter in present.items()})
            for part in first.parts
            if part in _ROW_PARTS
        }
        return replace(first, parts={**first.parts, **joined})
    if kind not in ("lora", "dora"):
        raise ValueError(f"{', '.join(present)} have adapters of kind {kind} of their own, which cannot become one of {place.path}")
    if kind == "dora" and len(present) < len(place.modules):
        raise ValueError(
            f"{', '.join(set(place.modules) - set(present))} has no magnitude, which {place.path} needs of all its parts"
        )
    return _stacked(place, present, key_map)


def unwritable(modules: Collection[str], kind: Kind, key_map: KeyMap, fmt: LoraFormat) -> list[str]:
    """Those of the adapted diffusers modules whose adapters of this kind cannot be written in the format."""
    return [module for module in modules if not _is_writable(module, modules, kind, key_map, fmt)]


def _is_writable(module: str, modules: Collection[str], kind: Kind, key_map: KeyMap, fmt: LoraFormat) -> bool:
    own, _ = fmt.of(module)
    source = key_map.sources_of(f"{module}.weight", "released")
    if own.unfused and _goes_by_diffusers_name(source, kind, own.unfused):
        return True
    if own.names == "diffusers":
        return _goes_by_diffusers_name(source, kind, own)
    if source.share is None:
        return _is_plain(source) or kind != "lokr"
    together = key_map.diffusers_names(source.key, "released")
    return {"lora": True, "dora": all(name.removesuffix(".weight") in modules for name in together)}.get(kind, False)


def _goes_by_diffusers_name(source: Source, kind: Kind, fmt: LoraFormat) -> bool:
    # Where rows are moved, ComfyUI moves those of what is added to the weight, but not those of the magnitude.
    return kind != "dora" or fmt.magnitude != SCALE or source.share is not None or _is_plain(source)


def _is_plain(source: Source) -> bool:
    return source == Source(source.key)


def _refuse_undividable(adapter: Adapter, path: str, *, fused: bool) -> None:
    if adapter.base_kind == "lokr":
        raise ValueError(
            f"the LoKr of {path} has rows in another order, or parts, in diffusers; a LoKr can be neither moved nor divided"
        )
    if MAGNITUDE in adapter.parts:
        raise ValueError(f"{path} has PEFT's magnitude under a released name; its rows are not known")
    if SCALE in adapter.parts and len(adapter.parts[SCALE]) != adapter.rows and fused:
        raise ValueError(f"the DoRA of {path} has a magnitude of columns, which cannot be divided into parts")


def _released(key_map: KeyMap, rows: Mapping[str, Tensor]) -> Tensor:
    """What belongs to the rows of diffusers weights, in the order of the released weight's."""
    [released] = key_map.to_released({f"{module}.weight": tensor for module, tensor in rows.items()}).values()
    return released


def _with_rows(adapter: Adapter, take: Callable[[Tensor], Tensor]) -> Adapter:
    """The adapter with ``take`` done to all that goes by the weight's rows."""
    parts = dict(adapter.parts)
    for part in _ROW_PARTS:
        if part in parts and (part != SCALE or len(parts[SCALE]) == adapter.rows):
            turned = "hada_t1" in parts and part.startswith("hada")  # then [rank, out]
            parts[part] = take(parts[part].T).T.contiguous() if turned else take(parts[part])
    return replace(adapter, parts=parts)


def _share_columns(adapters: Mapping[str, Adapter], kind: str) -> bool:
    first, *others = adapters.values()
    return all(
        other.kind == kind
        and (other.scale, other.alpha_dtype) == (first.scale, first.alpha_dtype)
        and other.parts.keys() == first.parts.keys()
        and all(torch.equal(other.parts[part], first.parts[part]) for part in _COLUMN_PARTS[kind] if part in first.parts)
        for other in others
    )


def _stacked(place: ModulePlace, present: Mapping[str, Adapter], key_map: KeyMap) -> Adapter:
    """One LoRA for all parts.  What moves rows of the weight moves those of B; a part without an adapter has zero rows in B."""
    if len({adapter.scale for adapter in present.values()}) > 1:
        present = {module: adapter.folded() for module, adapter in present.items()}
    first = next(iter(present.values()))
    downs = [adapter.parts[DOWN] for adapter in present.values()]
    total, start, ups = sum(map(len, downs)), 0, {}
    for module in place.modules:
        up = present[module].parts[UP] if module in present else _zero_rows(module, present, key_map)
        width = len(present[module].parts[DOWN]) if module in present else 0
        ups[module] = up.new_zeros(len(up), total, *up.shape[2:])
        ups[module][:, start : start + width] = up[:, :width]
        start += width
    parts = {DOWN: torch.cat(downs), UP: _released(key_map, ups)}
    if SCALE in first.parts:
        parts[SCALE] = _released(key_map, {module: adapter.parts[SCALE] for module, adapter in present.items()})
    return replace(first, parts=parts)


def _zero_rows(module: str, present: Mapping[str, Adapter], key_map: KeyMap) -> Tensor:
    """B of a module without an adapter, given those that the release holds in the same tensor."""
    other, adapter = next(iter(present.items()))
    start, stop, _ = key_map.sources_of(f"{module}.weight", "released").share
    other_start, other_stop, _ = key_map.sources_of(f"{other}.weight", "released").share
    up = adapter.parts[UP]
    return up.new_zeros(len(up) * (stop - start) // (other_stop - other_start), *up.shape[1:])


def _own_columns(ups: Sequence[Tensor]) -> list[slice | None]:
    """Which columns of B belong to each of the modules that share an adapter, given each module's rows of B.

    If B is block-diagonal, so that it was put together from adapters of the parts, each module has its own again, or None if it has
    only zeros; else each module has all of the rank.
    """
    rank = ups[0].shape[1]
    everything: list[slice | None] = [slice(0, rank)] * len(ups)
    used = [up.movedim(1, 0).flatten(1).any(dim=1).nonzero().flatten().tolist() for up in ups]
    present = [columns for columns in used if columns]
    if not present:
        return everything
    # Equal ranks first: columns of zeros at the edge of a block do not show whose they are.
    even = [rank // len(present) * index for index in range(len(present))]
    for starts in [even] * (rank % len(present) == 0) + [[0, *(columns[0] for columns in present[1:])]]:
        stops = [*starts[1:], rank]
        if all(start <= columns[0] and columns[-1] < stop for start, stop, columns in zip(starts, stops, present, strict=True)):
            blocks = iter(zip(starts, stops, strict=True))
            return [slice(*next(blocks)) if columns else None for columns in used]
    return everything


def module_of(name: str) -> str:
    """The module that a canonical name of an adapter's weight is of: ``x.lora_A.weight`` and ``x.hada_w1_a`` -> ``x``."""
    path, _, last = name.rpartition(".")
    return path.rpartition(".")[0] if last == "weight" else path


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Canonical names of adapter weights by their module and part."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        module = module_of(name)
        modules.setdefault(module, {})[name.removeprefix(f"{module}.")] = name
    return modules


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that canonical names of adapter weights are of, each once and in their order."""
    return list(by_module(names))
