"""Reading adapter files: of this project or another trainer, of any kind, in any of the usual spellings."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.errors import UserError, listed
from utils.formats.adapter_format import ALPHA, ENDINGS, NO_ADAPTER, PATH_SPELLINGS, SCALE, Kind
from utils.formats.adapter_kinds import Adapter, problem_of, rank_of, with_peft_magnitude
from utils.formats.adapter_layouts import split
from utils.formats.peft_config import config_scale, peft_configs
from utils.weights.keymap import KeyMap, ModulePlace
from utils.weights.tensor_files import SafetensorsFile

NAMED_PROBLEMS = 5

_KEY = re.compile(rf"(?P<spelling>.*)(?P<ending>{'|'.join(map(re.escape, ENDINGS))})", re.DOTALL)

ReadWeight = Callable[[str], Tensor]
"""Diffusers name of a base weight -> the weight."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was read."""

    kind: Kind
    weights: dict[str, Tensor]
    """By canonical name, ``<module>.lora_A.weight``, ``<module>.hada_w1_a``, …, unscaled.  A DoRA's magnitude is PEFT's."""
    scales: dict[str, float]
    """By module: what the difference is multiplied by: ``.alpha`` / rank, or what PEFT's config says, or 1 without either."""
    metadata: dict[str, str]


@dataclass(frozen=True)
class AdapterKeys:
    """A file's keys by what they seem to be."""

    adapters: dict[str, dict[str, str]]
    """By the spelling of the module's path: part -> key."""
    others: list[str]
    """Keys that do not end as a tensor of an adapter does."""

    @classmethod
    def of(cls, keys: Iterable[str]) -> "AdapterKeys":
        found = cls({}, [])
        for key in keys:
            if match := _KEY.fullmatch(key):
                found.adapters.setdefault(match["spelling"], {})[ENDINGS[match["ending"]]] = key
            else:
                found.others.append(key)
        return found


def place_of(spelling: str, key_map: KeyMap) -> ModulePlace | None:
    """The module that a path means, with whatever prefix it is spelt; None if the model has none of that name."""
    for prefix, separator, instead in PATH_SPELLINGS:
        if spelling.startswith(prefix) and (place := key_map.place_of(instead + spelling.removeprefix(prefix), separator)):
            return place
    return None


def prefix_of(spelling: str) -> str:
    """The prefix that a path is spelt with."""
    return next((prefix for prefix, _, _ in PATH_SPELLINGS if prefix and spelling.startswith(prefix)), "")


def open_adapter_file(path: Path) -> SafetensorsFile:
    """UserError for a file that cannot be read or is not whole."""
    try:
        return SafetensorsFile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_adapters(file: SafetensorsFile, key_map: KeyMap) -> tuple[dict[ModulePlace, Adapter], list[str]]:
    """The adapters of a file by the place that they are for, in the file's order; and what is wrong: then nothing may be used."""
    keys = AdapterKeys.of(file.entries)
    configs = peft_configs(file)
    problems = [f"{key}{_why_unknown(key)}" for key in keys.others]
    adapters: dict[ModulePlace, Adapter] = {}
    for spelling, parts in keys.adapters.items():
        place = place_of(spelling, key_map)
        if place is None:
            problems += [f"{key} belongs to no module of the model" for key in parts.values()]
            continue
        tensors = {part: file.read(key) for part, key in parts.items()}
        alpha = tensors.pop(ALPHA, None)
        named = ", ".join(place.modules)
        if problem := problem_of(tensors):
            problems.append(f"{named} {problem}")
        elif place in adapters:
            problems.append(f"{named} has more than one adapter")
        elif alpha is not None and alpha.numel() != 1:
            problems.append(f"{parts[ALPHA]} has the shape {list(alpha.shape)}; it should be one number")
        else:
            rank = rank_of(tensors)
            scale = scale_of(alpha, rank, configs, spelling)
            if alpha is not None and rank is None:
                tensors[ALPHA] = alpha  # readers ignore it
            adapters[place] = Adapter(tensors, scale, alpha.dtype if alpha is not None else None)
    return adapters, problems


def scale_of(alpha: Tensor | None, rank: int | None, configs: Mapping[str, dict[str, Any]], spelling: str) -> float:
    """What a module's difference is multiplied by: ``.alpha`` comes before PEFT's config, and a LoKr without a rank ignores it."""
    if alpha is None:
        return config_scale(configs, spelling, rank)
    return float(alpha) / rank if rank else 1.0


def read_adapter(path: Path, modules: Iterable[str], key_map: KeyMap, *, base: ReadWeight | None = None) -> AdapterFile:
    """Read an adapter file for training or merging, by the names of diffusers modules.

    ``modules``: diffusers paths of the model's modules that can have an adapter.  ``base`` reads the model's weights by diffusers
    name; a DoRA in ComfyUI's form needs it, for its magnitudes are told by them.  An adapter of a fused module is given to each of
    its parts; one that was put together from adapters of the parts is taken apart, so that each has its own rank again.

    Raises UserError for a file that is not whole, a key that belongs to no module, half an adapter or two of one module, matrices
    that do not fit together, several kinds in one file, and for what cannot be divided.
    """
    file = open_adapter_file(path)
    known = set(modules)
    places, problems = read_adapters(file, key_map)
    adapters: dict[str, Adapter] = {}
    for place, whole in places.items():
        if strange := [module for module in place.modules if module not in known]:
            problems.append(f"{place.path} belongs to no module of the model ({', '.join(strange)})")
            continue
        try:
            parts = split(place, whole, key_map)
            parts = {module: _with_peft_magnitude(module, adapter, base) for module, adapter in parts.items()}
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [f"{module} has more than one adapter" for module in parts if module in adapters]
        adapters |= parts
    kinds = sorted({adapter.kind for adapter in adapters.values()})
    if len(kinds) > 1:
        problems.append(f"it holds adapters of several kinds: {', '.join(kinds)}")
    refuse(f"{path} is not a LoRA of this model:", problems or ([] if adapters else ["it holds no adapter"]))
    weights = {
        f"{module}.{part}": tensor
        for module, adapter in adapters.items()
        for part, tensor in adapter.parts.items()
        if part != ALPHA
    }
    return AdapterFile(kinds[0], weights, {module: adapter.scale for module, adapter in adapters.items()}, file.metadata)


def _with_peft_magnitude(module: str, adapter: Adapter, base: ReadWeight | None) -> Adapter:
    if SCALE not in adapter.parts:
        return adapter
    if base is None:
        raise ValueError(f"{module} has a DoRA's magnitude in ComfyUI's form, which the base weights are needed for")
    return with_peft_magnitude(adapter, base(f"{module}.weight"))


def _why_unknown(key: str) -> str:
    what = next((told for endings, told in NO_ADAPTER.items() if key.endswith(endings)), None)
    return f" is {what}, which is not supported" if what else " belongs to no module of the model"


def refuse(heading: str, problems: list[str]) -> None:
    """UserError with the first few of the problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - NAMED_PROBLEMS} more"] if len(problems) > NAMED_PROBLEMS else []
        raise UserError(listed([*problems[:NAMED_PROBLEMS], *more], heading))
