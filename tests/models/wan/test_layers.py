"""The layers one after the other against diffusers' own forward, for every variant and option that changes the stream."""

import pytest
import torch

from models import load_family
from tests.models.wan import reference
from utils.draw import Draw
from utils.pipeline.layer import Stream
from utils.weights.named import materialise

CASES = {
    **{variant: (variant, {}) for variant in reference.PIPELINES},
    "wan-ti2v with a first frame": ("wan-ti2v", {"first_frame": True}),
    # Far shifted, so that the first clips are for the high-noise expert.
    **{f"{variant} for high noise": (variant, {"shift": 8.0}) for variant in ("wan22-t2v", "wan22-i2v")},
}


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    """(family, our model, diffusers' model)"""
    variant, options = CASES[request.param]
    folder = tmp_path_factory.mktemp(variant)
    Family = load_family("wan")
    Family.write_tiny(variant, folder, "diffusers", seed=0)
    family = Family(Family.Options(type="wan", path=folder, dtype="float32", **options))
    with torch.device("meta"):
        transformer = family.build_transformer()
    source = family.weights()
    materialise(transformer, source.names(), source, device="cpu")
    return family, transformer, reference.plain_model(folder)


def streams(family, transformer, inputs) -> list[Stream]:
    """What each layer returns."""
    passed = [Stream(inputs)]
    for layer in family.layers(transformer):
        passed.append(layer(passed[-1]))
    return passed[1:]


@pytest.mark.parametrize("index", [0, 1], ids=["clips", "pictures"])
def test_prediction_and_gradients_are_diffusers(case, index):
    family, transformer, plain = case
    batch = family.prepare_inputs(reference.batch(family, index), Draw(0, 0))
    output = streams(family, transformer, batch.inputs)[-1]
    expected = reference.predict(plain, batch.inputs)
    assert torch.equal(output["prediction"], expected)

    for model, prediction in ((transformer, output["prediction"]), (plain, expected)):
        model.zero_grad()
        family.loss(Stream(prediction=prediction), batch.target).backward()
    theirs = dict(plain.named_parameters())
    reached = [name for name, parameter in transformer.named_parameters() if parameter.grad is not None]
    assert reached == [name for name, parameter in theirs.items() if parameter.grad is not None]
    for name, parameter in transformer.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:  # of the other expert
            continue
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_two_times_travel_and_not_one_for_each_token(tmp_path):
    Family = load_family("wan")
    Family.write_tiny("wan-ti2v", tmp_path, "diffusers", seed=0)
    family = Family(Family.Options(type="wan", path=tmp_path, dtype="float32", first_frame=True))
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    embedded, *_, before_head, _ = streams(family, reference.plain_model(tmp_path), inputs)
    assert {name: tuple(tensor.shape) for name, tensor in embedded.items()} == {
        "hidden": (2, 48, 24),
        "context": (2, 512, 24),
        "modulation": (2, 2, 6, 24),
        "time": (2, 2, 24),
        "grid": (3,),
    }
    assert set(before_head) == {"hidden", "time", "grid"}
