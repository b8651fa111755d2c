"""What a file is, by its keys and shapes alone: whose model, and how much of it is understood."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.errors import UserError
from utils.formats.adapter_files import AdapterKeys, place_of
from utils.formats.adapter_format import ALPHA, Kind, LoraFormat
from utils.formats.adapter_kinds import Adapter, problem_of
from utils.weights.keymap import KeyMap, Layout
from utils.weights.named import WeightSource
from utils.weights.tensor_files import TensorInfo

Shapes = Mapping[str, Sequence[int]]


class OpenedWeights(Protocol):
    """A network of a file, found whole."""

    source: WeightSource
    config: dict[str, Any]

    def write_config(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Write ``config.json`` as diffusers reads it; False if it has none of its own."""


class KnownNetwork(Protocol):
    """A network that a family can read."""

    title: str
    key_map: Callable[[], KeyMap]
    in_folder: Layout | None
    """Whose names its file in a diffusers folder has; None where that file holds more."""

    def open(self, path: Path) -> OpenedWeights:
        """Raises UserError for a file that does not hold it whole."""


@dataclass(frozen=True)
class FileFacts:
    """What a family knows of its files without its model at hand."""

    networks: Mapping[str, KnownNetwork]
    """By the part's name; the first is ``transformer``."""
    architecture: str
    """Regular expression for the beginning of the model's name in the metadata of files."""
    key_map: Callable[[Shapes], KeyMap]
    """(shapes of weights by key in any spelling) -> the table of the transformer, and of text encoders that can be trained."""
    sizes: Mapping[tuple[int, int], str]
    """Released models by the number of their (first kind of) blocks and their width; they tell apart files that several families
    know all keys of."""
    folder: str = "transformer"
    """Of the transformer in a folder of diffusers; also its prefix in diffusers' LoRA files."""
    diffusers_kinds: frozenset[Kind] = frozenset(("lora", "dora"))
    """Kinds of adapters that the family's loader in diffusers takes."""
    marks: Callable[[Path, Mapping[str, Any]], Mapping[str, Tensor]] = lambda path, config: {}
    """(path of the transformer, its config) -> tensors that tell ComfyUI what diffusers has in configs."""
    with_marks: Callable[[Collection[str], Mapping[str, Any]], Mapping[str, Any]] = lambda marks, config: config
    """(names of such tensors, the transformer's config) -> the config for diffusers."""


@dataclass(frozen=True)
class KnownFamily:
    """A family whose files are known."""

    name: str
    facts: FileFacts
    lora_format: LoraFormat


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter file's keys as a family understands them."""

    family: KnownFamily
    key_map: KeyMap
    known: list[str]
    """Spellings of modules that the family has."""
    unknown: list[str]
    size: tuple[int, int] | None


@dataclass(frozen=True)
class FoundNetwork:
    """A network in a file."""

    family: KnownFamily
    part: str
    layout: Layout
    keys: frozenset[str]
    """Those of the file's keys that are its."""


def on_meta(entries: Mapping[str, TensorInfo], parts: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of one module's adapter without their values, by part."""
    infos = {part: entries[key] for part, key in parts.items() if part != ALPHA}
    return {part: torch.empty(info.shape, dtype=info.dtype, device="meta") for part, info in infos.items()}


def weight_shapes(entries: Mapping[str, TensorInfo], keys: AdapterKeys) -> dict[str, tuple[int, int]]:
    """The shape of the weight that each adapter is for, by ``<spelling>.weight``."""
    tensors = {spelling: on_meta(entries, parts) for spelling, parts in keys.adapters.items()}
    adapters = {spelling: Adapter(parts) for spelling, parts in tensors.items() if problem_of(parts) is None}
    return {f"{spelling}.weight": (adapter.rows, adapter.columns) for spelling, adapter in adapters.items()}


def recognise_adapter(
    entries: Mapping[str, TensorInfo], metadata: Mapping[str, str], families: Sequence[KnownFamily]
) -> list[FoundAdapter]:
    """The families that an adapter file may be of: those that know most of its modules; of several the one that it says it is of,
    or that has a model of its size.  More than one only if nothing tells them apart; none if no family knows a module.
    """
    keys = AdapterKeys.of(entries)
    shapes = weight_shapes(entries, keys)
    found = []
    for family in families:
        key_map = family.facts.key_map(shapes)
        known = {spelling: place_of(spelling, key_map) is not None for spelling in keys.adapters}
        found.append(
            FoundAdapter(
                family,
                key_map,
                known=[spelling for spelling, is_so in known.items() if is_so],
                unknown=[spelling for spelling, is_so in known.items() if not is_so],
                size=_adapter_size(shapes, key_map),
            )
        )
    most = max(len(candidate.known) for candidate in found)
    best = [candidate for candidate in found if most and len(candidate.known) == most]
    told = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    for tells in (
        lambda candidate: re.match(candidate.family.facts.architecture, told, re.IGNORECASE),
        lambda candidate: candidate.size in candidate.family.facts.sizes,
    ):
        if len(best) > 1 and (left := [candidate for candidate in best if tells(candidate)]):
            best = left
    return best


def the_one(found: Sequence[FoundAdapter], path: Path) -> FoundAdapter:
    """UserError if there is none, or more than one."""
    if not found:
        raise UserError(f"{path} has adapters, but of no model that is known here")
    if len(found) > 1:
        names = ", ".join(candidate.family.name for candidate in found)
        raise UserError(f"{path} may be of {names}: its keys are the same in all of them; say which with --family")
    return found[0]


def _adapter_size(shapes: Shapes, key_map: KeyMap) -> tuple[int, int] | None:
    """Number of blocks, as far as they have adapters, and width."""
    places = {spelling: place_of(spelling.removesuffix(".weight"), key_map) for spelling in shapes}
    return model_size({module: shapes[key] for key, place in places.items() if place for module in place.modules})


def model_size(shapes: Shapes) -> tuple[int, int] | None:
    """Number of blocks of the first kind, and what their attention takes in, by diffusers names; None without such names."""
    counts = block_counts(shapes)
    widths = [shape[1] for name, shape in shapes.items() if ".to_q" in name and len(shape) > 1]
    first = next((kind for kind in ("transformer_blocks", "blocks") if kind in counts), None)
    return (counts[first], widths[0]) if first and widths else None


def block_counts(names: Iterable[str]) -> dict[str, int]:
    """Number of blocks of each kind, by diffusers names."""
    counts: dict[str, int] = {}
    for name in names:
        if match := _BLOCK.match(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


_BLOCK = re.compile(r"(\w*blocks|(?:\w+\.)*layers)\.(\d+)\.")


def recognise_model(keys: Iterable[str], families: Sequence[KnownFamily]) -> list[FoundNetwork]:
    """The networks in a file, of the family that knows most of its keys; empty if it holds no known network."""
    keys = list(keys)
    return max((_networks_of(family, keys) for family in families), key=lambda found: sum(len(each.keys) for each in found))


def matching(family: KnownFamily, keys: Sequence[str]) -> list[FoundNetwork]:
    """Each network of the family that at least half of the keys, or of those after its prefix, are known of."""
    found = []
    for part, network in family.facts.networks.items():
        key_map = network.key_map()
        names = key_map.stripped(keys)
        if layout := key_map.layout_of(names):
            unknown = set(key_map.unknown(names, layout))
            found.append(FoundNetwork(family, part, layout, frozenset(key for name, key in names.items() if name not in unknown)))
    return found


def _networks_of(family: KnownFamily, keys: Sequence[str]) -> list[FoundNetwork]:
    """The family's networks, the one with most keys first; each key belongs to one of them."""
    taken: set[str] = set()
    chosen = []
    for network in sorted(matching(family, keys), key=lambda network: -len(network.keys)):
        if not network.keys & taken:
            chosen.append(network)
            taken |= network.keys
    return chosen
