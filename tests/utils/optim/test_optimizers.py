"""The run's optimizer against plain loops with the classes themselves, its precision, its independence of stages, its resume."""

import json
import sys
import tomllib
from pathlib import Path

import optimi
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.config.schema import OptimizerConfig
from utils.errors import UserError
from utils.optim.kinds import OPTIMIZERS, find_kind
from utils.optim.optimizers import RunOptimizer
from utils.optim.trials import couples_parameters, optimizer_problems

# Sizes that are no multiple of a vector register or of a quantisation block, and some large enough for 8-bit state.
SHAPES = {"a.weight": (96, 65), "a.bias": (65,), "b.weight": (7, 3, 3), "c.weight": (70, 70), "d.scale": ()}
CONFIGS = {
    **{name: {} for name in OPTIMIZERS},
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "prodigy": {"d0": 1e-3},
    # Of pytorch_optimizer: moments, factored moments, a Python counter per group, lists of tensors, averaged weights.
    **{name: {} for name in ("Lion", "CAME", "ADOPT", "SOAP", "ScheduleFreeAdamW")},
}
ALONE = [name for name in CONFIGS if name != "prodigy"]


def config(type_, lr=1e-2, **settings):
    return OptimizerConfig(type=type_, lr=lr, **{**CONFIGS.get(type_, {}), **settings})


def parameters(names=SHAPES, dtype=torch.float32, device="cpu"):
    made = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        if name in names:
            made[name] = nn.Parameter(value.to(device, dtype))
    return made


def gradient(name, step, dtype=torch.float32):
    """Very different sizes, so that a coupling shows."""
    index = list(SHAPES).index(name)
    generator = torch.Generator().manual_seed(100 * step + index)
    return (torch.randn(SHAPES[name], generator=generator) * 10.0 ** (index - 2)).to(dtype)


def backward(params, step):
    """Gradients by a real backward pass: the hooks run."""
    for name, parameter in params.items():
        (parameter * gradient(name, step, parameter.dtype).to(parameter)).sum().backward()


def train(params, optimizer, first, last):
    for step in range(first, last):
        backward(params, step)
        optimizer.step()
        optimizer.zero_grad()
    return params


def bits(params):
    return {name: parameter.detach().cpu().clone() for name, parameter in params.items()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"other bits in {different}"


# --- against the classes themselves --------------------------------------------------------------------------------------------


def muon(params):
    matrices = [parameter for parameter in params if parameter.ndim == 2]
    rest = [parameter for parameter in params if parameter.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.05, betas=(0.8, 0.99)),
    ]


REFERENCES = {
    "adamw": ({"betas": (0.8, 0.99), "weight_decay": 0.1}, lambda p: [torch.optim.AdamW(p, 1e-2, (0.8, 0.99), weight_decay=0.1)]),
    "sgd": ({}, lambda p: [torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.01)]),
    "adafactor": ({"d": 2.0}, lambda p: [torch.optim.Adafactor(p, 1e-2, d=2.0)]),
    "muon": ({"weight_decay": 0.05, "momentum": 0.9, "betas": (0.8, 0.99)}, muon),
    "adamw_optimi": ({}, lambda p: [optimi.AdamW(p, 1e-2)]),
    "stableadamw": ({}, lambda p: [optimi.StableAdamW(p, 1e-2)]),
    "prodigy": ({}, lambda p: [prodigyopt.Prodigy(p, 1e-2, d0=1e-3)]),
    "adamw_schedulefree": ({}, lambda p: [schedulefree.AdamWScheduleFree(p, 1e-2)]),
    "sgd_schedulefree": ({}, lambda p: [schedulefree.SGDScheduleFree(p, 1e-2)]),
    "lion": ({"weight_decay": 0.1}, lambda p: [pytorch_optimizer.Lion(p, 1e-2, weight_decay=0.1)]),
}


@pytest.mark.parametrize("type_", REFERENCES)
def test_equals_a_plain_loop(type_):
    settings, make = REFERENCES[type_]
    ours, plain = parameters(), parameters()
    train(ours, RunOptimizer(ours, config(type_, **settings)), 0, 5)
    references = make(list(plain.values()))
    for reference in references:
        if hasattr(reference, "train"):
            reference.train()
    for step in range(5):
        for name, parameter in plain.items():
            parameter.grad = gradient(name, step)
        for reference in references:
            reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours[name], parameters()[name])


def test_eight_bit_state_is_close_to_adamw():
    eight, full = parameters(), parameters()
    train(eight, RunOptimizer(eight, config("adamw8bit", lr=1e-3)), 0, 5)
    optimizer = RunOptimizer(full, config("adamw", lr=1e-3))
    train(full, optimizer, 0, 5)
    for name in ("a.weight", "c.weight"):
        moved, expected = eight[name] - parameters()[name], full[name] - parameters()[name]
        assert 0 < (moved - expected).norm() / expected.norm() < 0.05


def test_the_gradients_are_the_ones_that_are_stepped():
    """The engine clips them in place."""
    for dtype in (torch.float32, torch.bfloat16):
        clipped, scaled = parameters(dtype=dtype), parameters(dtype=dtype)
        optimizer = RunOptimizer(clipped, config("sgd", momentum=0.0, weight_decay=0.0))
        backward(clipped, 0)
        torch._foreach_mul_(list(optimizer.gradients().values()), 0.5)
        optimizer.step()
        train(scaled, RunOptimizer(scaled, config("sgd", lr=0.5e-2, momentum=0.0, weight_decay=0.0)), 0, 1)
        for name in SHAPES:
            torch.testing.assert_close(clipped[name], scaled[name])


def test_learning_rate():
    params = parameters()
    optimizer = RunOptimizer(params, config("muon", lr=0.5))
    before = bits(params)
    optimizer.set_lr(0.0)
    assert_same_bits(before, bits(train(params, optimizer, 0, 1)))
    optimizer.set_lr(0.5)
    train(params, optimizer, 1, 2)
    assert all(not torch.equal(before[name], params[name]) for name in SHAPES)


@pytest.mark.parametrize("type_", ALONE)
def test_each_parameter_has_its_own_learning_rate(type_, tmp_path):
    """A run with two rates steps each parameter as a run with its rate does, through a schedule and a checkpoint."""
    rates = {name: 3e-3 if name.startswith("a") else 1e-2 for name in SHAPES}

    def steps(params, optimizer, first, last):
        for step in range(first, last):
            optimizer.set_lr((step + 1) / 5)
            train(params, optimizer, step, step + 1)
        return params

    grouped = steps(params := parameters(), first := RunOptimizer(params, config(type_), rates.__getitem__), 0, 3)
    resumed = parameters()
    for name, parameter in resumed.items():
        parameter.data.copy_(grouped[name])
    second = RunOptimizer(resumed, config(type_), rates.__getitem__)
    second.load_state(*saved(first, tmp_path / "state.safetensors"))
    steps(resumed, second, 3, 5)
    for rate in set(rates.values()):
        whole = steps(params := parameters(), RunOptimizer(params, config(type_, lr=rate)), 0, 5)
        for name in [name for name in SHAPES if rates[name] == rate]:
            assert torch.equal(whole[name], resumed[name]), name


def test_a_parameter_without_gradient_stays():
    params = parameters()
    optimizer = RunOptimizer(params, config("adamw"))
    backward({"a.weight": params["a.weight"]}, 0)
    assert [name for name, value in optimizer.gradients().items() if value is not None] == ["a.weight"]
    optimizer.step()
    assert torch.equal(params["a.bias"], parameters()["a.bias"])


# --- small updates of low-precision weights ------------------------------------------------------------------------------------


def drifted(type_, dtype, **settings):
    """A weight of 1 under a constant gradient, 400 steps of 1e-5: it should come to 0.996."""
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = RunOptimizer({"w": weight}, config(type_, lr=1e-5, weight_decay=0.0, **settings))
    for _ in range(400):
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach()


@pytest.mark.parametrize("type_", ["adamw", "adamw8bit", "muon", "adamw_optimi", "stableadamw"])
def test_bf16_weights_move_as_fp32_weights_do(type_):
    expected = drifted(type_, torch.float32)
    assert torch.allclose(expected, torch.tensor(0.996), atol=1e-4)
    assert torch.equal(drifted(type_, torch.bfloat16), expected.bfloat16())


def test_without_master_weights_a_bf16_weight_does_not_move():
    """The control: this is what the copies are for."""
    assert torch.equal(drifted("adamw", torch.bfloat16, master_weights=False), torch.ones(8, dtype=torch.bfloat16))


def test_kahan_optimizers_keep_no_copies_unless_told_not_to_sum():
    for settings, has_master in (({}, False), ({"kahan_sum": False}, True)):
        tensors, _ = RunOptimizer(parameters(dtype=torch.bfloat16), config("adamw_optimi", **settings)).state()
        assert ("a.weight::master" in tensors) == has_master


@pytest.mark.parametrize("type_", ["adamw", "adamw_optimi"])
def test_micro_batches_are_summed_in_fp32(type_):
    """1 + 255 times 2^-9 is lost bit by bit in bf16 (its sum stays 1)."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = RunOptimizer({"w": weight}, config(type_))
    for scale in [1.0, *[2.0**-9] * 255]:
        (weight * scale).sum().backward()
    assert weight.grad is None
    summed = optimizer.gradients()["w"]
    assert summed.dtype is torch.float32
    assert torch.equal(summed, torch.full((4,), 1 + 255 * 2.0**-9))
    optimizer.zero_grad()
    assert optimizer.gradients() == {"w": None}


def test_fp32_and_bf16_parameters_side_by_side():
    """As in a model whose norms stay in fp32: each is treated by its own dtype."""
    mixed = {**parameters(["a.weight"], torch.bfloat16), **parameters(["a.bias"])}
    optimizer = RunOptimizer(mixed, config("adamw"))
    train(mixed, optimizer, 0, 3)
    assert [key for key in optimizer.state()[0] if key.endswith("::master")] == ["a.weight::master"]
    alone = train(only := parameters(["a.bias"]), RunOptimizer(only, config("adamw")), 0, 3)
    assert torch.equal(mixed["a.bias"], alone["a.bias"])


def test_parameters_may_be_filled_after_the_optimizer_is_made():
    params = parameters(dtype=torch.bfloat16)
    wanted = train(start := parameters(dtype=torch.bfloat16), RunOptimizer(start, config("adamw")), 0, 2)
    for parameter in params.values():
        parameter.data.zero_()
    optimizer = RunOptimizer(params, config("adamw"))
    for name, parameter in parameters(dtype=torch.bfloat16).items():
        params[name].data.copy_(parameter)
    assert_same_bits(bits(train(params, optimizer, 0, 2)), bits(wanted))


# --- stages --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_", ALONE)
def test_stepping_together_equals_stepping_apart(type_, dtype):
    """So the weights have the same bits however the layers are divided."""
    together = train(params := parameters(dtype=dtype), RunOptimizer(params, config(type_)), 0, 4)
    for name in SHAPES:
        apart = train(params := parameters([name], dtype), RunOptimizer(params, config(type_)), 0, 4)
        assert torch.equal(apart[name], together[name]), name


@pytest.mark.parametrize("type_", ["adamw", "sgd"])
def test_fused_steps_do_not_depend_on_the_number_of_threads(type_):
    """A machine with other cores gives the same bits.  The size is more than one thread's share and no multiple of anything."""
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = nn.Parameter(torch.linspace(-1, 1, 200_003))
            optimizer = RunOptimizer({"w": weight}, config(type_))
            for step in range(3):
                weight.grad = torch.sin(torch.arange(200_003.0) * (step + 1))
                optimizer.step()
            outcomes.append(weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_which_optimizers_couple_parameters():
    coupled = [type_ for type_ in CONFIGS if couples_parameters(config(type_))]
    assert coupled == ["prodigy"]
    assert couples_parameters(config("DAdaptAdam"))


def test_prodigy_does_differ_when_divided():
    """The control of the measurement above, on the weights: with steady gradients the estimated step size grows."""
    stepped = []
    for names in (list(SHAPES), ["a.weight"]):
        params = parameters(names)
        optimizer = RunOptimizer(params, config("prodigy", lr=1.0))
        for _ in range(6):
            backward(params, 0)
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(params["a.weight"])
    assert not torch.equal(*stepped)


@pytest.mark.parametrize("type_", ["adamw", "muon", "prodigy", "adamw_schedulefree", "Lion"])
def test_a_stage_without_parameters(type_):
    optimizer = RunOptimizer({}, config(type_))
    optimizer.set_lr(0.5)
    assert optimizer.gradients() == {}
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.evaluation():
        pass
    assert optimizer.state() == ({}, {})
    other = RunOptimizer(params := parameters(), config(type_))
    train(params, other, 0, 1)
    optimizer.load_state(*other.state())


# --- resume --------------------------------------------------------------------------------------------------------------------


def saved(optimizer, path):
    """State as a checkpoint brings it: tensors through a safetensors file, the rest through JSON."""
    tensors, scalars = optimizer.state()
    save_file({"": torch.zeros(1), **tensors}, path)
    return load_file(path), json.loads(json.dumps(scalars))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_", CONFIGS)
def test_a_resumed_run_has_the_same_bits(type_, dtype, tmp_path):
    straight = RunOptimizer(whole := parameters(dtype=dtype), config(type_))
    train(whole, straight, 0, 7)

    train(params := parameters(dtype=dtype), first := RunOptimizer(params, config(type_)), 0, 3)
    state = saved(first, tmp_path / "state.safetensors")
    weights = bits(params)
    resumed = parameters(dtype=dtype)
    second = RunOptimizer(resumed, config(type_))
    for name, parameter in resumed.items():
        parameter.data.copy_(weights[name])
    second.load_state(*state)
    train(resumed, second, 3, 7)

    assert_same_bits(bits(resumed), bits(whole))
    (tensors, scalars), (expected_tensors, expected_scalars) = second.state(), straight.state()
    assert_same_bits(tensors, expected_tensors)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in expected_tensors.items()}
    assert scalars == expected_scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_", ALONE)
@pytest.mark.parametrize(
    ("written_by", "read_by"),
    [
        ([["a.weight", "a.bias"], ["b.weight", "c.weight", "d.scale"]], [list(SHAPES)]),
        ([list(SHAPES)], [["a.weight"], ["a.bias", "b.weight"], ["c.weight", "d.scale"], []]),
    ],
    ids=["two to one", "one to four"],
)
def test_resume_with_another_number_of_stages(type_, dtype, written_by, read_by, tmp_path):
    whole = train(params := parameters(dtype=dtype), RunOptimizer(params, config(type_)), 0, 5)
    tensors, scalars, weights = {}, {}, {}
    for names in written_by:
        train(params := parameters(names, dtype), optimizer := RunOptimizer(params, config(type_)), 0, 2)
        some_tensors, some_scalars = saved(optimizer, tmp_path / "state.safetensors")
        tensors |= some_tensors
        scalars |= some_scalars
        weights |= bits(params)
    for names in read_by:
        params = parameters(names, dtype)
        optimizer = RunOptimizer(params, config(type_))
        for name in names:
            params[name].data.copy_(weights[name])
        optimizer.load_state(tensors, scalars)
        train(params, optimizer, 2, 5)
        assert_same_bits(bits(params), {name: whole[name].detach() for name in names})


def test_settings_come_from_the_config_and_not_from_the_checkpoint():
    train(params := parameters(), first := RunOptimizer(params, config("adamw", lr=1.0, weight_decay=0.5)), 0, 1)
    second = RunOptimizer(parameters(), config("adamw", lr=1e-4, weight_decay=0.0))
    second.load_state(*first.state())
    [part] = second._parts
    assert (part.param_groups[0]["lr"], part.param_groups[0]["weight_decay"]) == (1e-4, 0.0)


@pytest.mark.parametrize(
    ("now", "dtype", "names", "message"),
    [
        (config("sgd"), torch.bfloat16, ["a.weight"], "is of AdamW, optimizer.type = 'sgd' is SGD"),
        (config("adamw"), torch.bfloat16, ["a.weight", "d.scale"], "no optimizer state for 'd.scale'"),
        (config("adamw", master_weights=False), torch.bfloat16, ["a.weight"], "has an fp32 master weight of 'a.weight'"),
        (config("adamw"), torch.float32, ["a.weight"], "dtype that the run was started with"),
    ],
)
def test_a_state_that_does_not_fit(now, dtype, names, message):
    params = parameters(["a.weight", "a.bias"], torch.bfloat16)
    train(params, written := RunOptimizer(params, config("adamw")), 0, 1)
    with pytest.raises(UserError, match=message):
        RunOptimizer(parameters(names, dtype), now).load_state(*written.state())


def test_a_state_with_a_tensor_missing():
    train(params := parameters(), optimizer := RunOptimizer(params, config("adamw")), 0, 1)
    tensors, scalars = optimizer.state()
    del tensors["c.weight::exp_avg"]
    with pytest.raises(UserError, match=r"no tensor 'c\.weight::exp_avg'"):
        RunOptimizer(parameters(), config("adamw")).load_state(tensors, scalars)


# --- schedule-free -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_weights_while_evaluating(dtype):
    """Inside they are the average that schedulefree gives, afterwards the run goes on as if it had not been."""
    ours, undisturbed = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, other = (RunOptimizer(params, config("adamw_schedulefree")) for params in (ours, undisturbed))
    train(ours, optimizer, 0, 4)
    train(undisturbed, other, 0, 4)
    plain = {name: nn.Parameter(value.float()) for name, value in parameters(dtype=dtype).items()}
    reference = schedulefree.AdamWScheduleFree(plain.values(), 1e-2)
    reference.train()
    for step in range(4):
        for name, parameter in plain.items():
            parameter.grad = gradient(name, step, dtype).float()
        reference.step()
    reference.eval()

    with optimizer.evaluation():
        for name in SHAPES:
            torch.testing.assert_close(ours[name], plain[name].to(dtype))
        assert not torch.equal(ours["a.weight"], undisturbed["a.weight"])
    assert_same_bits(bits(ours), bits(undisturbed))
    train(ours, optimizer, 4, 7)
    train(undisturbed, other, 4, 7)
    assert_same_bits(bits(ours), bits(undisturbed))
    assert_same_bits(optimizer.state()[0], other.state()[0])


def test_evaluation_comes_back_after_an_error():
    train(params := parameters(), optimizer := RunOptimizer(params, config("adamw_schedulefree")), 0, 2)
    before = bits(params)
    with pytest.raises(RuntimeError, match="out of memory"), optimizer.evaluation():
        raise RuntimeError("out of memory")
    assert_same_bits(bits(params), before)
    train(params, optimizer, 2, 3)


def test_evaluation_of_other_optimizers_changes_nothing():
    params = parameters()
    optimizer = RunOptimizer(params, config("adamw"))
    with optimizer.evaluation():
        assert_same_bits(bits(params), bits(parameters()))


# --- bad input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [*CONFIGS, "AdamW", "AdamW8bitKahan", "StableAdamW", "adamw_Optimi", "schedule-free-adamw"])
def test_known_types_have_no_problems(type_):
    assert optimizer_problems(config(type_)) == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"type": "adamv"}, ["optimizer.type = 'adamv' is not known, did you mean 'adamw'?", "known are adamw, sgd, adafactor"]),
        ({"type": "came2"}, ["did you mean 'came'?"]),
        ({"type": "sgd", "momentun": 0.9}, ["optimizer.momentun", "did you mean 'momentum'?", "accepted: dampening, momentum"]),
        ({"type": "sgd", "betas": (0.9, 0.99)}, ["optimizer.betas is not a setting of 'sgd'"]),
        ({"type": "adafactor", "eps": 1e-8}, ["optimizer.eps is not a setting of 'adafactor'", "beta2_decay"]),
        ({"type": "adamw_optimi", "gradient_release": True}, ["optimizer.gradient_release is not a setting"]),
        ({"type": "Lion", "momentum": 0.9}, ["optimizer.momentum is not a setting of 'Lion'", "accepted: betas"]),
        ({"type": "adamw", "betas": (1.5, 0.9)}, ["optimizer.type = 'adamw' refuses its settings", "1.5"]),
        ({"type": "lbfgs"}, ["cannot be used here", "closure"]),
        ({"type": "kron"}, ["cannot be used here", "random numbers"]),
        ({"type": "StableSPAM"}, ["cannot be used here", "hides a part of its state"]),
        ({"type": "AggMo"}, ["cannot be used here", "momentum_buffer", "which a checkpoint cannot hold"]),
        ({"type": "MADGRAD"}, ["cannot be used here", "belongs to no parameter"]),
    ],
)
def test_problems(settings, parts):
    [problem] = optimizer_problems(OptimizerConfig(lr=1e-3, **settings))
    assert all(part in problem for part in parts), problem


def test_all_bad_keys_at_once():
    problems = optimizer_problems(OptimizerConfig(type="adamw", lr=1e-3, beta=0.9, weightdecay=0.1))
    assert [problem.split()[0] for problem in problems] == ["optimizer.beta", "optimizer.weightdecay"]
    with pytest.raises(UserError, match=r"(?s)optimizer\.beta .*optimizer\.weightdecay"):
        RunOptimizer(parameters(), OptimizerConfig(type="adamw", lr=1e-3, beta=0.9, weightdecay=0.1))


@pytest.mark.parametrize(
    ("type_", "module", "extra"),
    [
        ("adamw8bit", "bitsandbytes.optim", "bitsandbytes"),
        ("adamw_optimi", "optimi", "optimi"),
        ("prodigy", "prodigyopt", "prodigy"),
        ("sgd_schedulefree", "schedulefree", "schedulefree"),
        ("Lion", "pytorch_optimizer", "pytorch-optimizer"),
    ],
)
def test_a_missing_package(type_, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # what `import` sees for a package that is not there
    [problem] = optimizer_problems(config(type_))
    assert f'pip install -e ".[{extra}]"' in problem
    with pytest.raises(UserError, match="pip install"):
        RunOptimizer(parameters(), config(type_))


def test_every_extra_is_one_of_the_project():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    named = {kind.extra for kind in OPTIMIZERS.values() if kind.extra} | {find_kind("Lion").extra}
    assert named <= project["optional-dependencies"].keys()


def test_the_check_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    optimizer_problems(config("kron"))
    assert torch.equal(before, torch.get_rng_state())


# --- on a GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("type_", ["adamw", "sgd", "adamw8bit", "adamw_optimi", "adamw_schedulefree"])
def test_division_and_resume_on_a_gpu(type_, tmp_path):
    whole = train(params := parameters(dtype=torch.bfloat16, device="cuda"), RunOptimizer(params, config(type_)), 0, 5)
    for name in SHAPES:
        train(params := parameters([name], torch.bfloat16, "cuda"), first := RunOptimizer(params, config(type_)), 0, 2)
        resumed = {name: nn.Parameter(params[name].detach().clone())}
        second = RunOptimizer(resumed, config(type_))
        second.load_state(*saved(first, tmp_path / "state.safetensors"))
        train(resumed, second, 2, 5)
        assert torch.equal(resumed[name], whole[name]), name
