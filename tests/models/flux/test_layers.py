"""The layers in order against diffusers' own forward."""

import pytest
import torch

from models.common.tokens import pack, unpack
from models.flux import Family
from models.flux.layers import token_ids
from tests.models.flux import reference
from utils.data.encoders import EncodeItem
from utils.draw import Draw
from utils.pipeline.layer import Stream
from utils.weights.named import materialise


def opened(folder, variant: str, **options):
    Family.write_tiny(variant, folder, "diffusers", seed=0)
    return Family(Family.Options(type="flux", path=folder, **{"dtype": "float32", **options}))


def filled_transformer(family):
    with torch.device("meta"):
        transformer = family.build_transformer()
    assert materialise(transformer, family.weights().names(), family.weights(), device="cpu") == []
    return transformer


def through(layers, inputs):
    stream = Stream(inputs)
    for layer in layers:
        stream = layer(stream)
    return stream


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("variant", Family.variants)
def test_the_layers_compute_what_diffusers_computes(tmp_path, variant, index):
    family = opened(tmp_path, variant)
    assert family.variant == variant
    transformer, plain = filled_transformer(family), reference.plain_model(tmp_path)
    prepared = family.prepare_inputs(reference.batch(family, index), Draw(3, 0))
    output = through(family.layers(transformer), prepared.inputs)
    expected = reference.predict(plain, prepared.inputs)
    assert torch.equal(output["prediction"], expected)
    assert expected.std() > 0.1
    family.loss(output, prepared.target).backward()
    torch.nn.functional.mse_loss(expected, prepared.target["velocity"]).backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in transformer.named_parameters():
        assert wanted[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-5, atol=1e-5 * wanted[name].grad.abs().max().item())


@pytest.mark.parametrize("variant", Family.variants)
def test_in_bfloat16_the_stream_is_bfloat16_and_the_time_is_not_rounded(tmp_path, variant):
    family = opened(tmp_path, variant, dtype="bfloat16")
    transformer = filled_transformer(family)
    layers = family.layers(transformer)
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(3, 0)).inputs
    # Apart by less than bfloat16 tells at 0.9.
    times = [layers[0](Stream(inputs | {"t": torch.full((2,), t)}))["time"] for t in (0.9, 0.901)]
    assert times[0].dtype is torch.bfloat16
    assert not torch.equal(*times)
    with torch.autocast("cpu", torch.bfloat16):
        stream = Stream(inputs)
        for layer in layers[:-1]:
            stream = layer(stream)
            assert {tensor.dtype for tensor in stream.values()} == {torch.bfloat16, torch.int64}
        prediction = layers[-1](stream)["prediction"]
    expected = reference.predict(reference.plain_model(tmp_path), inputs)
    assert (prediction - expected).abs().max() < 0.1 * expected.abs().max()


def test_guidance_reaches_the_model(tmp_path):
    outputs = []
    for guidance in (1.0, 3.5):
        family = opened(tmp_path, "flux1-dev", guidance=guidance)
        inputs = family.prepare_inputs(reference.batch(family, 0), Draw(3, 0)).inputs
        assert inputs["guidance"].tolist() == [guidance] * 2
        outputs.append(through(family.layers(filled_transformer(family)), inputs)["prediction"])
    assert not torch.allclose(*outputs)


def test_packing_is_the_pipelines_and_unpacking_undoes_it():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack(latents), reference.packed(latents))
    assert torch.equal(unpack(pack(latents), 3, 5), latents)


def test_ids_are_those_of_the_kontext_pipeline(tmp_path):
    family = opened(tmp_path, "flux1-kontext")
    pipeline = reference.PIPELINES["flux1-kontext"].from_pretrained(tmp_path)
    picture = torch.rand(1, 3, 48, 80) * 2 - 1
    latents, references, ids, reference_ids = pipeline.prepare_latents(
        picture, 1, 16, 48, 80, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    assert latents.shape == references.shape == (1, 15, 64)
    assert torch.equal(token_ids(7, 3, 5, references=1), torch.cat([torch.zeros(7, 3), ids, reference_ids]))
    encoder = next(encoder for encoder in family.encoders() if encoder.name == "references")
    encoder.load(torch.device("cpu"))
    [fields] = encoder.encode([EncodeItem("a", controls=(picture[0][:, None],))])
    assert torch.equal(pack(fields["references"]), references)


@pytest.mark.parametrize(
    ("rows", "columns", "corners"),
    [
        # Below while that is not taller (2 + 2, 4 + 2, 6 + 2) than beside is wide (4 + 4).
        (2, 4, [(0, 0), (2, 0), (4, 0), (6, 0), (0, 4)]),
        (4, 2, [(0, 0), (0, 2), (0, 4), (4, 0)]),
        (3, 3, [(0, 0), (3, 0), (0, 3)]),
    ],
)
def test_further_references_lie_below_or_beside_as_in_comfyui(rows, columns, corners):
    ids = token_ids(0, rows, columns, references=len(corners)).view(-1, rows, columns, 3)
    assert ids[0, 0, 0].tolist() == [0, 0, 0]
    assert ids[1:, 0, 0].tolist() == [[1, *corner] for corner in corners]
    assert ids[-1, -1, -1].tolist() == [1, corners[-1][0] + rows - 1, corners[-1][1] + columns - 1]
