"""The layers, one after the other, against diffusers' own forward: the same bits, and the same gradients."""

import copy

import pytest
import torch
from torch import nn

from models import load_family
from tests.models.qwen_image import reference
from utils.draw import Draw
from utils.pipeline.layer import Stream

Family = load_family("qwen_image")


def family_of(folder):
    return Family(Family.Options(type="qwen_image", path=folder, dtype="float32"))


def run(layers, inputs):
    """The layers in order, with the stream's names after each of them."""
    stream, names = Stream(inputs), []
    for layer in layers:
        stream = layer(stream)
        names.append(set(stream))
    return stream, names


@pytest.mark.parametrize("index", [0, 3], ids=["padded captions", "equal captions"])
@pytest.mark.parametrize("variant", Family.variants)
def test_layers_are_the_model(tiny_qwen, variant, index):
    family = family_of(tiny_qwen(variant))
    plain = reference.plain_model(tiny_qwen(variant))
    split = copy.deepcopy(plain)
    prepared = family.prepare_inputs(reference.batch(family, index), Draw(0, 0))
    assert ("text_mask" in prepared.inputs) == (index == 0)

    expected = reference.predict(plain, prepared.inputs)
    output, names = run(family.layers(split), prepared.inputs)
    assert expected.shape == prepared.target["velocity"].shape
    assert torch.equal(output["prediction"], expected)
    mask = {"text_mask"} if index == 0 else set()
    assert names == [*[{"hidden", "context", "time", "grids"} | mask] * 4, {"hidden", "time", "grids"}, {"prediction"}]

    family.loss(output, prepared.target).backward()
    nn.functional.mse_loss(expected, prepared.target["velocity"]).backward()
    for (name, theirs), ours in zip(plain.named_parameters(), split.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        if ours.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp_min(1e-3), name


def test_what_the_last_block_does_for_the_text_gets_no_gradient(tiny_qwen):
    """Nothing reads it.  Whoever trains all weights must expect no gradient there."""
    family = family_of(tiny_qwen("qwen-image"))
    model = reference.plain_model(tiny_qwen("qwen-image"))
    prepared = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0))
    output, _ = run(family.layers(model), prepared.inputs)
    family.loss(output, prepared.target).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    expected = ["attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
    assert without == {f"transformer_blocks.3.{name}.{kind}" for name in expected for kind in ("weight", "bias")}


def test_time_is_not_rounded_to_the_weights_dtype(tiny_qwen):
    """Two times that are one number in bfloat16 give different outputs."""
    family = family_of(tiny_qwen("qwen-image"))
    layers = family.layers(reference.plain_model(tiny_qwen("qwen-image")).to(torch.bfloat16))
    inputs = family.prepare_inputs(reference.batch(family, 3), Draw(0, 0)).inputs
    first, second = (torch.tensor([value, value]) for value in (0.7001, 0.7011))
    assert torch.equal(first.bfloat16(), second.bfloat16())
    times = [layers[0](Stream(inputs).replaced(t=t))["time"] for t in (first, second)]
    assert times[0].dtype is torch.bfloat16
    assert not torch.equal(*times)


def test_hidden_states_stay_in_bfloat16_under_autocast(tiny_qwen):
    family = family_of(tiny_qwen("qwen-image-edit-2511"))
    model = reference.plain_model(tiny_qwen("qwen-image-edit-2511")).to(torch.bfloat16)
    prepared = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0))
    exact = reference.predict(reference.plain_model(tiny_qwen("qwen-image-edit-2511")), prepared.inputs)
    stream = Stream(prepared.inputs)
    for layer in family.layers(model):
        layer.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        stream = layer(stream)
        floats = {name: tensor.dtype for name, tensor in stream.items() if tensor.is_floating_point()}
        assert set(floats.values()) == {torch.bfloat16}, floats
    assert (stream["prediction"] - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("change", ["reference", "its time"])
def test_references_take_part_and_have_time_zero_in_2511(tiny_qwen, change):
    """The reference changes the target's prediction; with ``zero_cond_t`` its own modulation is another one."""
    family = family_of(tiny_qwen("qwen-image-edit-2511"))
    model = reference.plain_model(tiny_qwen("qwen-image-edit-2511"))
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    usual = run(family.layers(model), inputs)[0]["prediction"]
    if change == "reference":
        inputs["x"] = torch.cat([inputs["x"][:, :16], inputs["x"][:, 16:].flip(1)], dim=1)
        layers = family.layers(model)
    else:
        layers = family.layers(model)
        for layer in layers[1:-1]:
            layer._positions[0].is_reference = lambda grids, device: torch.zeros(1, 48, dtype=torch.int32)
    other = run(layers, inputs)[0]["prediction"]
    assert (usual - other).abs().max() > 1e-2
