"""``prepare_inputs`` against what diffusers' pipeline and scheduler feed the UNet, and what the options do."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.sdxl import Family
from models.sdxl.tiny import write_tiny
from tests.models.sdxl import reference
from utils.config.load import load_config
from utils.draw import Draw
from utils.errors import UserError
from utils.pipeline.layer import Stream


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    write_tiny("sdxl", folder, "diffusers", seed=0)
    return folder


def family_of(model, **options) -> Family:
    return Family(Family.Options(type="sdxl", path=model, dtype="float32", **options))


def ddpm(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **options)


SCHEDULERS = {
    "epsilon": ddpm(),
    "v_prediction": ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
}


@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_noise_and_target_are_those_of_the_scheduler(model, prediction):
    family = family_of(model, prediction=prediction)
    batch = reference.batch(family, 0)
    prepared = family.prepare_inputs(batch, Draw(0, 0))
    for index, key in enumerate(batch.keys):
        latents = batch.fields["latents"][index][None, :, 0]
        noise = Draw(0, 0).normal(key, "noise", tuple(latents.shape[1:]))[None]
        step = prepared.inputs["t"][index : index + 1]
        scheduler = SCHEDULERS[prediction]
        assert torch.allclose(prepared.inputs["x"][index], scheduler.add_noise(latents, noise, step)[0], atol=3e-5)
        target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, step)
        assert torch.allclose(prepared.target["velocity"][index], target[0], atol=3e-5)
    assert "weights" not in prepared.target
    assert prepared.inputs["t"].dtype is torch.int64


def test_time_ids_are_the_pipelines(model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    family = family_of(model)
    ids = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs["time_ids"]
    original, corner, target = (tuple(pair) for pair in ids[0].reshape(3, 2).tolist())
    projection_dim = pipeline.text_encoder_2.config.projection_dim
    theirs = pipeline._get_add_time_ids(original, corner, target, torch.float32, projection_dim)
    assert torch.equal(ids[:1].float(), theirs)


def test_steps_are_drawn_evenly_and_cut(model):
    def steps(**options) -> torch.Tensor:
        family = family_of(model, **options)
        batch = reference.batch(family, 0)
        batch.fields.update({name: values[:1] * 400 for name, values in batch.fields.items()})
        batch.keys[:] = [f"{index}#0" for index in range(400)]
        return family.prepare_inputs(batch, Draw(0, 0)).inputs["t"]

    every = steps()
    assert every.min() >= 0
    assert every.max() <= 999
    assert [int(((every >= low) & (every < low + 250)).sum()) for low in (0, 250, 500, 750)] == pytest.approx([100] * 4, abs=30)
    some = steps(min_t=0.2, max_t=0.4)
    assert (some.min() >= 200, some.max() <= 400) == (True, True)


def test_weights_are_those_of_the_snr(model):
    alphas = SCHEDULERS["epsilon"].alphas_cumprod.double()
    rescaled = SCHEDULERS["v_prediction"].alphas_cumprod.double()

    def prepared(**options):
        family = family_of(model, **options)
        return family.prepare_inputs(reference.batch(family, 0), Draw(0, 0))

    for prediction, table in (("epsilon", alphas), ("v_prediction", rescaled)):
        steps = prepared(prediction=prediction).inputs["t"]
        snr = (table / (1 - table))[steps]
        over = snr if prediction == "epsilon" else snr + 1
        weights = prepared(prediction=prediction, min_snr_gamma=5.0).target["weights"]
        assert torch.allclose(weights.double(), snr.clamp(max=5) / over, rtol=1e-3)
        weights = prepared(prediction=prediction, debiased_estimation_loss=True).target["weights"]
        expected = snr**-0.5 if prediction == "epsilon" else 1 / (snr + 1)
        assert torch.allclose(weights.double(), expected, rtol=1e-3)


def test_the_loss_counts_samples_by_their_weights(model):
    family = family_of(model, debiased_estimation_loss=True)
    target = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).target
    prediction = torch.zeros_like(target["velocity"])
    means = target["velocity"].square().flatten(1).mean(1)
    loss = family.loss(Stream(prediction=prediction), target)
    assert float(loss) == pytest.approx(float((means * target["weights"]).mean()), rel=1e-6)
    assert target["weights"][0] != target["weights"][1]


def test_noise_offset_moves_whole_channels(model):
    plain, moved = (family_of(model, noise_offset=offset) for offset in (0.0, 0.1))
    batch = reference.batch(plain, 0)
    first, second = (family.prepare_inputs(batch, Draw(0, 0)).target["velocity"] for family in (plain, moved))
    offsets = second - first
    assert torch.allclose(offsets, offsets[:, :, :1, :1].expand_as(offsets), atol=1e-6)
    assert 0.01 < float(offsets.std()) < 0.3


def test_texts_of_different_length_do_not_change_each_other(model):
    """A shorter text is repeated: attention to it, and so the prediction, stays what it is alone."""
    family, unet = family_of(model), reference.plain_model(model).eval()
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    assert inputs["text"].shape[1] == math.lcm(*(77 * chunks for chunks in reference.CHUNKS))
    alone = {name: values[:1] for name, values in inputs.items()} | {"text": inputs["text"][:1, :77]}
    with torch.no_grad():
        together = reference.predict(unet, inputs)[:1]
        assert torch.allclose(together, reference.predict(unet, alone), atol=1e-5)


def test_it_is_a_pure_function_of_seed_epoch_and_key(model):
    family = family_of(model, noise_offset=0.1)
    batch = reference.batch(family, 0)
    first = family.prepare_inputs(batch, Draw(1, 2))
    torch.rand(100)
    second = family.prepare_inputs(batch, Draw(1, 2))
    for name in first.inputs:
        assert torch.equal(first.inputs[name], second.inputs[name])
    assert not torch.equal(first.inputs["x"], family.prepare_inputs(batch, Draw(1, 3)).inputs["x"])


def test_what_the_files_say_of_the_prediction(model, tmp_path):
    """The scheduler's config of a diffusers folder, the markers of a single file, and the options before both."""

    def told(path, **options) -> tuple[str, bool]:
        family = family_of(path, **options)
        return family.prediction, family.zero_terminal_snr

    assert told(model) == ("epsilon", False)
    assert told(model, prediction="v_prediction") == ("v_prediction", True)
    assert told(model, prediction="v_prediction", zero_terminal_snr=False) == ("v_prediction", False)

    folder = shutil.copytree(model, tmp_path / "diffusers")
    file = folder / "scheduler/scheduler_config.json"
    for zero_snr in (False, True):
        config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        assert told(folder) == ("v_prediction", zero_snr)
    assert told(folder, prediction="epsilon") == ("epsilon", False)

    write_tiny("sdxl", tmp_path / "released", "released", seed=0)
    checkpoint = tmp_path / "released/sd_xl_base_1.0.safetensors"
    state = load_file(checkpoint)
    assert told(checkpoint) == ("epsilon", False)
    for markers in ({"v_pred"}, {"v_pred", "ztsnr"}):
        save_file({**state, **{name: torch.zeros(0) for name in markers}}, checkpoint)
        assert told(checkpoint) == ("v_prediction", "ztsnr" in markers)


def test_settings_that_exclude_each_other(model):
    for options, key in (
        ({"prediction": "epsilon", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"min_snr_gamma": 5.0, "debiased_estimation_loss": True}, "debiased_estimation_loss"),
    ):
        with pytest.raises(ValidationError, match=key):
            Family.Options(type="sdxl", path=model, **options)
    with pytest.raises(UserError, match="nothing to predict it from"):
        family_of(model, zero_terminal_snr=True)


def test_a_file_of_diffusion_pipe_is_read(model, tmp_path):
    (tmp_path / "data.toml").write_text('resolutions = [64]\n[[directory]]\npath = "pictures"\n')
    (tmp_path / "main.toml").write_text(
        f"""
        output_dir = "runs"
        dataset = "{tmp_path / "data.toml"}"
        epochs = 1
        [model]
        type = "sdxl"
        checkpoint_path = "{model}"
        dtype = "float32"
        v_pred = true
        min_snr_gamma = 5
        [optimizer]
        type = "adamw"
        lr = 1e-4
        """
    )
    loaded = load_config(tmp_path / "main.toml", lambda name: Family.Options)
    assert (loaded.run.model.path, loaded.run.model.prediction) == (model, "v_prediction")
    assert loaded.run.model.min_snr_gamma == 5
    assert len(loaded.notices) == 2
