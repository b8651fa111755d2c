"""Which modules get an adapter: by name, by the numbers of blocks, and with which rank and alpha."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from utils.adapters.kinds import KINDS, Size
from utils.config.schema import AdapterConfig, AdapterOverride, block_numbers
from utils.errors import UserError, listed

log = logging.getLogger(__name__)

Patterns = str | list[str]

NAMED = 4
"""So many names stand in a message."""


def matches(patterns: Patterns, name: str) -> bool:
    """A string is a regular expression for the whole name, a list holds name endings (as PEFT reads them)."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def size_of(config: AdapterConfig, module: str) -> Size:
    """Rank and alpha of the adapter of a module with this name."""
    own = next((entry for entry in config.override if matches(entry.modules, module)), None)
    rank = (own and own.rank) or config.rank
    alpha = (own and own.alpha) or config.alpha
    return Size(rank, rank if alpha is None else alpha)


def select(
    config: AdapterConfig, default_targets: str, modules: Mapping[str, nn.Module], frozen: Callable[[str], bool]
) -> list[str]:
    """Names of the modules that get an adapter, in the model's order.

    ``modules``: the model's, by diffusers name.  ``frozen``: which of them are not to be trained.  Raises UserError with everything
    that does not fit: a pattern that is no regular expression or matches nothing, block numbers that the model does not have,
    modules that cannot have an adapter of this kind.
    """
    _refuse_bad_expressions(config)
    targets = config.target_modules or default_targets
    excluded = config.exclude_modules
    hits = [name for name in modules if matches(targets, name) and not (excluded and matches(excluded, name))]
    if not hits:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise UserError(
            f"adapter.target_modules = {targets!r} matches no module of the model; its linear modules are named like "
            f"{', '.join(linear[len(linear) // 2 : len(linear) // 2 + NAMED])}"
        )
    problems: list[str] = []
    hits = [name for name in hits if not frozen(name)]
    if not hits:
        raise UserError(f"adapter.target_modules = {targets!r} matches only parts of the model whose learning rate is 0")
    if config.layers is not None:
        hits = _in_layers(config.layers, hits, modules, problems)
        if not hits and not problems:
            problems.append(f"adapter.layers = {config.layers!r} leaves none of the modules that adapter.target_modules matches")
    fitting = [name for name in hits if isinstance(modules[name], KINDS[config.type].modules)]
    if wrong := [name for name in hits if name not in set(fitting)]:
        allowed = ", ".join(kind.__name__ for kind in KINDS[config.type].modules)
        problems.append(
            f"adapter.target_modules = {targets!r} matches {wrong[0]!r}, a {type(modules[wrong[0]]).__name__}"
            f"{_and_more(len(wrong) - 1)}; a {config.type} goes on {allowed} only"
        )
    problems += _override_problems(config.override, hits)
    problems += _rank_problems(config, {name: modules[name] for name in fitting})
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else listed(problems, "the adapter does not fit the model:"))
    return hits


def _refuse_bad_expressions(config: AdapterConfig) -> None:
    for patterns in (config.target_modules, config.exclude_modules, *(entry.modules for entry in config.override)):
        try:
            re.compile(patterns if isinstance(patterns, str) else "")
        except re.error as error:
            raise UserError(f"adapter: {error.pattern!r} is not a regular expression: {error}") from None


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _block_of(name: str) -> tuple[str, int] | None:
    """The list of blocks that a module is in, and the block's number: what stands before the first number of its name, and that."""
    match = re.match(r"(.+?)\.(\d+)(\.|$)", name)
    return (match[1], int(match[2])) if match else None


def _in_layers(layers: str | dict[str, str], hits: Sequence[str], names: Iterable[str], problems: list[str]) -> list[str]:
    """Those of ``hits`` that are in the blocks that ``adapter.layers`` names."""
    there: dict[str, set[int]] = {}
    for name in names:
        if block := _block_of(name):
            there.setdefault(block[0], set()).add(block[1])
    lists = list(dict.fromkeys(block[0] for name in hits if (block := _block_of(name))))
    known = ", ".join(f"{name} ({min(there[name])}-{max(there[name])})" for name in lists)
    if isinstance(layers, str):
        if len(lists) != 1:
            raise UserError(
                f"adapter.layers = {layers!r} does not say of which blocks: the adapter goes on {known or 'no blocks'}; "
                "give a table with the numbers of each list, like " + _example(lists)
            )
        layers = {lists[0]: layers}
    if strange := [name for name in layers if name not in lists]:
        raise UserError(f"adapter.layers names {', '.join(strange)}; the blocks that the adapter goes on are {known or 'none'}")
    wanted = {name: block_numbers(text) for name, text in layers.items()}
    for name, numbers in wanted.items():
        if missing := sorted(numbers - there[name]):
            problems.append(f"adapter.layers names block {missing[0]} of {name}, which has only {_range(there[name])}")
    return [name for name in hits if (block := _block_of(name)) and block[1] in wanted.get(block[0], ())]


def _range(numbers: set[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}"


def _example(lists: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{name}" = "0-1"' if "." in name else f'{name} = "0-1"' for name in lists) + "}"


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _override_problems(overrides: Sequence[AdapterOverride], hits: Sequence[str]) -> list[str]:
    problems = []
    owners: dict[str, list[int]] = {}
    for index, entry in enumerate(overrides):
        found = [name for name in hits if matches(entry.modules, name)]
        if not found:
            problems.append(
                f"adapter.override[{index}].modules = {entry.modules!r} matches no module that gets an adapter; those are named "
                f"like {', '.join(hits[:NAMED])}"
            )
        for name in found:
            owners.setdefault(name, []).append(index)
    if twice := [name for name, entries in owners.items() if len(entries) > 1]:
        both = " and ".join(f"adapter.override[{index}]" for index in owners[twice[0]])
        problems.append(f"{both} match {twice[0]}{_and_more(len(twice) - 1)}; a module can have one entry")
    return problems


def _rank_problems(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """Ranks that make of alpha something that nobody means.  Those that are of no use are a warning: files of such ranks exist."""
    shapes = {name: list(module.weight.shape) for name, module in modules.items()}
    ranks = {name: size_of(config, name).rank for name in modules}
    if not KINDS[config.type].is_bounded:
        highest = max((max(shape[0], math.prod(shape[1:])) for shape in shapes.values()), default=config.rank)
        if config.alpha is None or config.rank <= highest:
            return []
        return [
            f"adapter.rank = {config.rank} leaves no factor to be decomposed, but adapter.alpha = {config.alpha:g} is divided by "
            f"it, a scale of {config.alpha / config.rank:.2g}; leave alpha out"
        ]
    limits = {name: min(shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    if too_high := [name for name, limit in limits.items() if ranks[name] > limit]:
        name = min(too_high, key=limits.__getitem__)
        log.warning(
            "adapter.rank = %d is above what %s can use%s: its weight is %s, so a rank above %d adds nothing; "
            "[[adapter.override]] can give it a rank of its own",
            ranks[name],
            name,
            _and_more(len(too_high) - 1),
            shapes[name],
            limits[name],
        )
    return []


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""
