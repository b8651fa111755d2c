"""``prepare_inputs``: noise, time and dropped text; and what the options do."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from models.sd3 import Family
from tests.models.sd3.reference import batch, plain_model, predict
from utils.data.values import Batch
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.export import TrainingFacts, export_full

CLIP_L, CLIP_G = slice(0, 192), slice(192, 512)
FACTS = TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-3, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd35-medium")
    Family.write_tiny("sd35-medium", folder, "diffusers", seed=0)
    return folder


def family_of(model, **options):
    return Family(Family.Options(type="sd3", path=model, dtype="float32", **options))


def many(family, count) -> Batch:
    """One sample under many keys."""
    fields = {name: values[:1] * count for name, values in batch(family, 0).fields.items()}
    return Batch(keys=[f"{index}#0" for index in range(count)], fields=fields)


def test_noise_and_time_are_those_of_the_schedulers_path(model):
    family = family_of(model)
    samples = batch(family, 0)
    prepared = family.prepare_inputs(samples, Draw(0, 0))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler")
    for index, key in enumerate(samples.keys):
        latents, time = samples.fields["latents"][index][:, 0], prepared.inputs["t"][index]
        noise = Draw(0, 0).normal(key, "noise", tuple(latents.shape))
        # What the scheduler makes of a picture at this time (image to image), and its own step from there to the end.
        scheduler.set_timesteps(sigmas=[float(time) / 1000])
        scheduler.sigmas[0] = time / 1000  # set_timesteps has shifted it
        noisy = scheduler.scale_noise(latents[None], scheduler.timesteps[:1], noise[None])[0]
        assert torch.allclose(prepared.inputs["x"][index], noisy, atol=1e-5)
        end = scheduler.step(prepared.target["velocity"][index], scheduler.timesteps[0], noisy).prev_sample
        assert torch.allclose(end, latents, atol=1e-5)
    assert {tensor.dtype for tensor in (*prepared.inputs.values(), *prepared.target.values())} == {torch.float32}
    assert prepared.inputs["t"][0] != prepared.inputs["t"][1]


def test_it_is_a_pure_function_of_seed_epoch_and_key(model):
    family = family_of(model, clip_l_dropout=0.5, t5_dropout=0.5)
    samples = batch(family, 0)
    one = family.prepare_inputs(samples, Draw(1, 2))
    torch.rand(100)
    turned = Batch(keys=samples.keys[::-1], fields={name: values[::-1] for name, values in samples.fields.items()})
    again = family.prepare_inputs(turned, Draw(1, 2))
    for name, tensor in one.inputs.items():
        assert torch.equal(tensor, again.inputs[name].flip(0)), name
    other = family.prepare_inputs(samples, Draw(1, 3))
    assert not torch.equal(one.inputs["x"], other.inputs["x"])


def test_shift_of_the_release_unless_the_options_say_otherwise(model):
    def mean(**options) -> float:
        family = family_of(model, **options)
        return float(family.prepare_inputs(many(family, 64), Draw(0, 0)).inputs["t"].mean())

    assert mean() == mean(shift=3.0)
    assert mean(shift=1.0) < mean() - 100


def parts(family, draw, count=200):
    """For each part of the text whether it is there, by sample."""
    prepared = family.prepare_inputs(many(family, count), draw).inputs
    length = len(batch(family, 0).fields["clip_l"][0])
    clip = prepared["text"][:, :length]
    there = {
        "clip_l": clip[..., CLIP_L],
        "clip_g": clip[..., CLIP_G],
        "clip_l pooled": prepared["pooled"][:, CLIP_L],
        "clip_g pooled": prepared["pooled"][:, CLIP_G],
        "t5": prepared["text"][:, length:],
    }
    flags = {name: tensor.flatten(1).ne(0) for name, tensor in there.items()}
    assert all(torch.equal(flag.any(1), flag.all(1)) for flag in flags.values()), "a part is there whole or not at all"
    return {name: flag.all(1) for name, flag in flags.items()}


def test_each_encoder_is_dropped_by_itself(model):
    there = parts(family_of(model, clip_l_dropout=0.5, clip_g_dropout=0.3, t5_dropout=0.2), Draw(0, 0))
    for name, rate in {"clip_l": 0.5, "clip_g": 0.3, "t5": 0.2}.items():
        assert float(there[name].float().mean()) == pytest.approx(1 - rate, abs=0.1)
    for name in ("clip_l", "clip_g"):
        assert torch.equal(there[name], there[f"{name} pooled"])
    kinds = {tuple(bool(there[name][index]) for name in ("clip_l", "clip_g", "t5")) for index in range(200)}
    assert len(kinds) == 8


def test_nothing_is_dropped_without_being_asked_and_in_evaluation(model):
    assert all(flag.all() for flag in parts(family_of(model), Draw(0, 0)).values())
    family = family_of(model, clip_l_dropout=1.0, clip_g_dropout=0.9, t5_dropout=0.9)
    assert not parts(family, Draw(0, 0))["clip_l"].any()
    assert all(flag.all() for flag in parts(family, Draw(0, 0, fixed_time=0.4)).values())


def test_pictures_beyond_the_positions_are_refused(model):
    family = family_of(model)
    samples = batch(family, 0)
    samples.fields["latents"] = [torch.zeros(16, 1, 8, 50)] * 2
    with pytest.raises(UserError, match="400 x 64 pixels; sd35-medium has positions for 384 a side"):
        family.prepare_inputs(samples, Draw(0, 0))


def test_options_without_effect_warn(model, caplog):
    family_of(model, t5=False, t5_dropout=0.1)
    assert "have no effect: model.t5 = false" in caplog.text


@pytest.mark.parametrize("variant", Family.variants)
def test_diffusers_reads_a_full_export_as_a_single_file(variant, tmp_path):
    Family.write_tiny(variant, tmp_path, "diffusers", seed=0)
    family = family_of(tmp_path)
    model = plain_model(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    weights = dict(model.named_parameters())
    file = export_full(
        tmp_path,
        "full",
        weights,
        expected={name: value.shape for name, value in weights.items()},
        key_map=family.full_key_map(),
        companions=family.companions(),
        dtype=None,
        family=family.export_metadata(),
        facts=FACTS,
    )
    inputs = family.prepare_inputs(batch(family, 0), Draw(0, 0)).inputs
    loaded = SD3Transformer2DModel.from_single_file(file, config=str(tmp_path / "transformer"))
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
