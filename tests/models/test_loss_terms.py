"""Masks and weights with each family's targets: loss and gradients of the plain diffusers model, cut out by hand."""

import importlib

import pytest
import torch
from torch import Tensor, nn

from models import family_names, load_family
from utils.data.batches.loss_terms import with_loss_terms
from utils.draw import Draw

FIRST = [(name, load_family(name).variants[0]) for name in family_names()]
VARIANTS = [pytest.param(name, variant, id=variant) for name, variant in [*FIRST, ("wan", "wan-ti2v")]]
PIXELS = {"flux2-dev": 16, "wan-ti2v": 16}
"""Along a side of one place of the latents, where that is not 8, as of masks in the cache."""
OPTIONS = {"wan-ti2v": {"first_frame": True}}
"""Its first latent frame is given, so that it has a mask of its own."""
WEIGHTS = [1.0, 0.25]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_only_what_is_in_the_mask_is_trained_by_its_weight(name, variant, tmp_path):
    """The left half of the first sample, all of the second; of a clip the last latent frames of the first."""
    Family, reference = load_family(name), importlib.import_module(f"tests.models.{name}.reference")
    Family.write_tiny(variant, tmp_path, "diffusers", seed=0)
    family = Family(Family.Options(type=name, path=tmp_path, dtype="float32", **OPTIONS.get(variant, {})))
    made = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0))

    velocity = made.target["velocity"]
    *_, height, width = velocity.shape
    latent_frames = velocity.shape[2] if velocity.ndim == 5 else 1
    finer = PIXELS.get(variant, 8) // 8
    mask = torch.zeros(4 * (latent_frames - 1) + 1, finer * height, finer * width)
    mask[-4:, :, : finer * (width // 2)] = 1  # the last latent frame, or the picture
    target = with_loss_terms(made, [mask, None], WEIGHTS).target

    model = reference.plain_model(tmp_path)
    prediction = reference.predict(model, made.inputs)
    loss = family.loss({"prediction": prediction}, target)
    square = (prediction - velocity).square()
    last = slice(latent_frames - 1, None) if velocity.ndim == 5 else slice(None)
    cut = square[0, :, last, ..., : width // 2] if velocity.ndim == 5 else square[0, ..., : width // 2]
    whole = square[1, :, 1:] if variant in OPTIONS else square[1]
    expected = (WEIGHTS[0] * cut.mean() + WEIGHTS[1] * whole.mean()) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

    found, by_hand = gradients(model, loss), gradients(model, expected)
    norm = torch.stack([gradient.norm() for gradient in by_hand.values()]).norm()
    assert norm > 0
    for parameter, gradient in by_hand.items():
        assert (found[parameter] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * norm), parameter

    # Whatever the target is outside the mask, no gradient changes by a bit.
    elsewhere = velocity.clone()
    elsewhere[0, ..., width // 2 :] += 1000
    moved = gradients(model, family.loss({"prediction": prediction}, {**target, "velocity": elsewhere}))
    assert all(torch.equal(moved[parameter], gradient) for parameter, gradient in found.items())
