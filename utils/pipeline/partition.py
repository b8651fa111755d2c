"""Dividing the layers over the stages."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from utils.errors import UserError
from utils.pipeline.layer import PipelineLayer

# A layer without weights still costs something; this keeps it from being free to pile up.
_WEIGHT_OF_A_LAYER = 1


def layer_weights(layers: Sequence[PipelineLayer]) -> list[int]:
    """Parameters of each layer, frozen ones too: DeepSpeed counts only trainable ones, which says nothing when training a LoRA."""
    return [sum(parameter.numel() for parameter in layer.parameters()) + _WEIGHT_OF_A_LAYER for layer in layers]


def balanced(costs: Sequence[int], stages: int) -> list[int]:
    """First layer of each stage, and the end: contiguous parts whose largest cost is as small as possible.

    Among equal divisions the one with the earlier boundaries is taken.  Each stage gets at least one layer.
    """
    count = len(costs)
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[s][n]: (largest part, boundaries) for the first n layers over s stages.
    best: list[tuple[int, tuple[int, ...]] | None] = [(total[n], (0,)) if n else None for n in range(count + 1)]
    for stage in range(2, stages + 1):
        following: list[tuple[int, tuple[int, ...]] | None] = [None] * (count + 1)
        for stop in range(stage, count + 1):
            options = []
            for start in range(stage - 1, stop):
                before = best[start]
                if before is not None:
                    options.append((max(before[0], total[stop] - total[start]), (*before[1], start)))
            following[stop] = min(options)
        best = following
    result = best[count]
    assert result is not None, "more stages than layers must have been refused before"
    return [*result[1], count]


def _by_weights(layers: Sequence[PipelineLayer], stages: int, split: Sequence[int] | None) -> list[int]:
    return balanced(layer_weights(layers), stages)


def _by_count(layers: Sequence[PipelineLayer], stages: int, split: Sequence[int] | None) -> list[int]:
    return balanced([1] * len(layers), stages)


def _by_hand(layers: Sequence[PipelineLayer], stages: int, split: Sequence[int] | None) -> list[int]:
    bounds = [0, *(split or []), len(layers)]
    if len(bounds) != stages + 1 or any(after <= before for before, after in pairwise(bounds)):
        raise UserError(
            f"partition_split = {list(split or [])}: with pipeline_stages = {stages} it must hold {stages - 1} rising layer "
            f"numbers between 1 and {len(layers) - 1}; --check lists the layers"
        )
    return bounds


METHODS: dict[str, Callable[[Sequence[PipelineLayer], int, Sequence[int] | None], list[int]]] = {
    "parameters": _by_weights,
    "uniform": _by_count,
    "manual": _by_hand,
}


def divide(layers: Sequence[PipelineLayer], stages: int, method: str, split: Sequence[int] | None = None) -> list[int]:
    """Boundaries ``b`` of the stages: stage ``s`` runs layers ``b[s]`` to ``b[s + 1] - 1``.

    Raises UserError if there are more stages than layers, or if a split by hand does not fit.
    """
    if stages > len(layers):
        raise UserError(f"pipeline_stages = {stages}, but the model has only {len(layers)} layers; use at most {len(layers)}")
    return METHODS[method](layers, stages, split)
