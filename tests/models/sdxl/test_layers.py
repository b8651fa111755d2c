"""The UNet as a row of layers against diffusers' own forward, and what travels between the layers."""

import pytest
import torch

from models import load_family
from tests.models.sdxl import reference
from utils.draw import Draw
from utils.pipeline.layer import Stream

SIZES = ((16, 16), (12, 20), (10, 14), (9, 7))
"""Of the latents; the last two are not divisible by the four that the UNet makes them smaller."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    load_family("sdxl").write_tiny("sdxl", folder, "diffusers", seed=0)
    return folder


@pytest.fixture(scope="module")
def family(folder):
    Family = load_family("sdxl")
    return Family(Family.Options(type="sdxl", path=folder, dtype="float32"))


def inputs_of(family, size: tuple[int, int], monkeypatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(reference, "SHAPES", (size, size))
    return family.prepare_inputs(reference.batch(family, 0), Draw(1, 0)).inputs


def run(layers, inputs) -> list[Stream]:
    """The stream after each layer."""
    streams = [Stream(inputs)]
    for layer in layers:
        streams.append(layer(streams[-1]))
    return streams[1:]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layers_are_the_model(family, folder, size, monkeypatch):
    inputs = inputs_of(family, size, monkeypatch)
    plain, ours = reference.plain_model(folder), reference.plain_model(folder)
    expected = reference.predict(plain, inputs)
    prediction = run(family.layers(ours), inputs)[-1]["prediction"]
    assert torch.equal(prediction, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * weights).sum().backward()
    (prediction * weights).sum().backward()
    for (name, theirs), parameter in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (parameter.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_low_precision_is_the_models_too(family, folder, monkeypatch):
    inputs = inputs_of(family, (16, 16), monkeypatch)
    model = reference.plain_model(folder).bfloat16()
    lower = {name: value.bfloat16() if name in ("x", "text", "pooled") else value for name, value in inputs.items()}
    with torch.no_grad():
        expected = reference.predict(model, lower)
        prediction = run(family.layers(model), inputs)[-1]["prediction"]
    assert prediction.dtype is torch.bfloat16
    assert (prediction - expected).norm() <= 0.02 * expected.norm()


def test_the_stream_holds_what_later_layers_use(family, folder, monkeypatch):
    layers = family.layers(reference.plain_model(folder))
    streams = run(layers, inputs_of(family, (16, 16), monkeypatch))
    assert len(layers) == 23
    assert [sum(name.startswith("skip_") for name in stream) for stream in streams] == [
        *range(1, 10),  # the way down
        *(9, 9),  # the middle
        *(8, 7, 6, 6, 5, 4, 3, 3, 2, 1, 0),  # the way up with two upsamplers
        0,
    ]
    for index, stream in enumerate(streams[:-1]):
        used = torch.autograd.grad(
            run(layers[index + 1 :], cut := Stream({n: t.detach().requires_grad_() for n, t in stream.items()}))[-1][
                "prediction"
            ].sum(),
            list(cut.values()),
            allow_unused=True,
        )
        assert all(gradient is not None for gradient in used), (index, type(layers[index]).__name__)
    assert set(streams[-1]) == {"prediction"}
