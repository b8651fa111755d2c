"""The average of the weights against its formula; its independence of stages and threads; its resume."""

import pytest
import torch
from torch import nn

from tests.utils.optim.test_optimizers import SHAPES, assert_same_bits, bits, config, parameters, train
from utils.config.schema import EmaConfig
from utils.errors import UserError
from utils.optim.ema import WeightAverage
from utils.optim.optimizers import RunOptimizer

STEPS = 8


def averaged(names=SHAPES, dtype=torch.float32, first=0, last=STEPS, state=None, **settings):
    """Parameters, optimizer and average after some steps; ``state``: that of an optimizer and an average, and the weights."""
    params = parameters(names, dtype)
    optimizer = RunOptimizer(params, config("adamw"))
    if state:
        optimizer_state, average_state, weights = state
        for name, parameter in params.items():
            parameter.data.copy_(weights[name])
        optimizer.load_state(*optimizer_state)
    average = WeightAverage(optimizer, EmaConfig(**{"decay": 0.9, **settings}))
    if state:
        average.load_state(*average_state)
    for step in range(first, last):
        train(params, optimizer, step, step + 1)
        average.update(step + 1)
    return params, optimizer, average


@pytest.mark.parametrize("settings", [{}, {"decay": 0.2}, {"ramp": False}, {"start_step": 3}, {"start_step": 3, "ramp": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_formula(dtype, settings):
    """In fp64, of the weights as they are stepped: the fp32 copies of bf16 weights."""
    decay, start, ramp = settings.get("decay", 0.9), settings.get("start_step", 0), settings.get("ramp", True)
    params = parameters(dtype=dtype)
    optimizer = RunOptimizer(params, config("adamw"))
    expected = {name: value.double() for name, value in optimizer.values().items()}
    for step in range(1, STEPS + 1):
        train(params, optimizer, step - 1, step)
        n = step - start
        d = 0.0 if n < 1 else min(decay, (1 + n) / (10 + n)) if ramp else decay
        for name, value in optimizer.values().items():
            expected[name] = d * expected[name] + (1 - d) * value.double()
    _, _, average = averaged(dtype=dtype, **settings)
    tensors, _ = average.state()
    for name in SHAPES:
        assert tensors[name].dtype is torch.float32
        torch.testing.assert_close(tensors[name].double(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_the_average_inside_and_themselves_outside(dtype):
    params, optimizer, average = averaged(dtype=dtype)
    before = bits(params)
    with average.in_place():
        assert_same_bits(bits(params), {name: value.to(dtype) for name, value in average.state()[0].items()})
        assert not torch.equal(params["a.weight"], before["a.weight"])
        with pytest.raises(AssertionError):
            optimizer.step()
    assert_same_bits(bits(params), before)
    with pytest.raises(RuntimeError, match="out of memory"), average.in_place():
        raise RuntimeError("out of memory")
    assert_same_bits(bits(params), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apart_and_resumed_it_has_the_same_bits(dtype):
    _, _, whole = averaged(dtype=dtype)
    params, optimizer, average = averaged(dtype=dtype, last=3)
    state = optimizer.state(), average.state(), bits(params)
    for names in (["a.weight", "d.scale"], ["a.bias", "b.weight", "c.weight"]):
        _, _, resumed = averaged(names, dtype, 3, STEPS, state)
        assert_same_bits(resumed.state()[0], {name: whole.state()[0][name] for name in names})
        assert resumed.state()[1] == whole.state()[1] == {"updates": STEPS}


def test_the_number_of_threads_changes_no_bit():
    """The size is more than one thread's share and no multiple of anything."""
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = nn.Parameter(torch.sin(torch.arange(200_003.0)))
            average = WeightAverage(RunOptimizer({"w": weight}, config("sgd")), EmaConfig(decay=0.99))
            for step in range(1, 4):
                weight.data = torch.sin(torch.arange(200_003.0) * (step + 1))
                average.update(step)
            outcomes.append(average.state()[0]["w"].clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_a_state_that_lacks_a_weight():
    _, _, average = averaged(last=1)
    tensors, scalars = average.state()
    del tensors["c.weight"]
    with pytest.raises(UserError, match=r"no average of 'c\.weight'"):
        average.load_state(tensors, scalars)
