"""Layers over stages."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.pipeline.layer import PipelineLayer
from utils.pipeline.partition import balanced, divide, layer_weights


class Wide(PipelineLayer):
    def __init__(self, size: int, frozen: bool = False):
        super().__init__()
        self.linear = torch.nn.Linear(size, size, bias=False)
        self.requires_grad_(not frozen)


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=9), data=st.data())
def test_no_other_division_has_a_smaller_largest_part(costs, data):
    stages = data.draw(st.integers(1, len(costs)))

    def largest(bounds):
        return max(sum(costs[a:b]) for a, b in pairwise(bounds))

    found = balanced(costs, stages)
    assert len(found) == stages + 1
    assert all(a < b for a, b in pairwise(found))
    every = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), stages - 1))
    assert largest(found) == min(map(largest, every))


def test_frozen_weights_count():
    layers = [Wide(10, frozen=True), Wide(10, frozen=True), Wide(2), Wide(2)]
    assert layer_weights(layers)[0] > layer_weights(layers)[2]
    assert divide(layers, 2, "parameters") == [0, 1, 4]
    assert divide(layers, 2, "uniform") == [0, 2, 4]


def test_a_division_by_hand():
    layers = [Wide(2) for _ in range(5)]
    assert divide(layers, 3, "manual", [1, 4]) == [0, 1, 4, 5]
    for wrong in ([1], [4, 1], [0, 2], [2, 5], None):
        with pytest.raises(UserError, match=r"partition_split = .*2 rising layer numbers between 1 and 4; --check lists"):
            divide(layers, 3, "manual", wrong)


def test_more_stages_than_layers():
    with pytest.raises(UserError, match=r"pipeline_stages = 4, but the model has only 3 layers; use at most 3"):
        divide([Wide(2)] * 3, 4, "parameters")
