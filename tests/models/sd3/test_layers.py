"""The pipeline layers in order against diffusers' own forward, for every variant."""

import pytest
import torch

from models.sd3 import Family
from tests.models.sd3.reference import batch, plain_model, predict
from utils.draw import Draw
from utils.pipeline.layer import Stream
from utils.runtime import RuntimePolicy
from utils.weights.named import canonical_name, materialise


@pytest.fixture(scope="module", params=Family.variants)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    Family.write_tiny(request.param, folder, "diffusers", seed=0)
    return folder


def made(folder, dtype="float32"):
    """The family, its transformer with weights, and the layers over it."""
    family = Family(Family.Options(type="sd3", path=folder, dtype=dtype))
    with torch.device("meta"):
        transformer = family.build_transformer()
        layers = family.layers(transformer)
    assert materialise(transformer, list(transformer.state_dict()), family.weights(), device="cpu") == []
    return family, transformer, layers


def run(layers, inputs):
    """The streams after each layer."""
    streams = [Stream(inputs)]
    for layer in layers:
        streams.append(layer(streams[-1]))
    return streams[1:]


@pytest.mark.parametrize("index", [0, 1])
def test_loss_and_gradients_are_those_of_the_plain_model(folder, index):
    family, transformer, layers = made(folder)
    micro_batch = family.prepare_inputs(batch(family, index), Draw(3, 0))
    model = plain_model(folder)

    expected = predict(model, micro_batch.inputs)
    output = run(layers, micro_batch.inputs)[-1]
    assert torch.equal(output["prediction"], expected)

    family.loss(output, micro_batch.target).backward()
    family.loss(Stream(prediction=expected), micro_batch.target).backward()
    theirs = dict(model.named_parameters())
    for name, parameter in transformer.named_parameters():
        gradient = theirs[canonical_name(name)].grad
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-6), name


def test_the_stream_holds_what_later_layers_use(folder):
    family, _, layers = made(folder)
    streams = run(layers, family.prepare_inputs(batch(family, 0), Draw(3, 0)).inputs)
    assert [set(stream) for stream in streams] == [
        *[{"hidden", "context", "time", "grid"}] * (len(layers) - 2),
        {"hidden", "time", "grid"},
        {"prediction"},
    ]
    assert all(stream["grid"].dtype is torch.int64 for stream in streams[:-1])


def test_bf16_flows_as_bf16_and_keeps_the_time_in_fp32(folder):
    family, transformer, layers = made(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert transformer.pos_embed.pos_embed.dtype is torch.float32
    for layer in layers:
        layer.autocast = RuntimePolicy(torch.device("cpu"), torch.bfloat16).autocast()
    inputs = family.prepare_inputs(batch(family, 0), Draw(3, 0)).inputs
    streams = run(layers, inputs)
    assert {stream[name].dtype for stream in streams[:-1] for name in stream if name != "grid"} == {torch.bfloat16}
    exact = predict(plain_model(folder), inputs)
    assert (streams[-1]["prediction"].float() - exact).abs().mean() < 0.02 * exact.std()

    # 900.0 and 900.5 are the same number in bf16.
    near = [layers[0](Stream({**inputs, "t": torch.full((2,), t)}))["time"] for t in (900.0, 900.5)]
    assert not torch.equal(*near)
