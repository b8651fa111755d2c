"""``prepare_inputs`` against what diffusers' pipelines feed their model, and what the options do."""

import math

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from models import load_family
from models.flux.keys import flux_key_map
from tests.models.flux import reference
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Batch, Bucket
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.export import TrainingFacts, export_full

BUCKET = Bucket(width=96, height=64, frames=1)
CAPTION = "a cup of coffee on the table"
VARIANTS = tuple(reference.PIPELINES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    for variant in VARIANTS:
        load_family("flux").write_tiny(variant, root / variant, "diffusers", seed=0)
    return root


def family_of(path, **options):
    Family = load_family("flux")
    return Family(Family.Options(type="flux", path=path, dtype="float32", **options))


@pytest.fixture(scope="module")
def pictures(assets):
    """Target and control."""
    files = (assets.images["astronaut.png"], assets.images["coffee.png"])
    return [load_pixels(DataFile(file), BUCKET) for file in files]


@pytest.fixture(scope="module")
def encoded(models, pictures):
    """What the encoders of Kontext make of real pictures; the other variants read less of it, and schnell half the text."""
    item = EncodeItem(key="a", caption=CAPTION, pixels=pictures[0], controls=(pictures[1],))
    fields = {}
    for encoder in family_of(models / "flux1-kontext").encoders():
        encoder.load(torch.device("cpu"))
        fields |= encoder.encode([item])[0]
    return fields


def batch_of(fields, *keys: str) -> Batch:
    return Batch(keys=list(keys), fields={name: [value] * len(keys) for name, value in fields.items()})


def recorded(transformer: torch.nn.Module) -> list[dict]:
    """What the transformer is called with, from now on."""
    calls = []
    transformer.register_forward_pre_hook(lambda module, positional, given: calls.append(given), with_kwargs=True)
    return calls


@pytest.mark.parametrize("variant", ["flux1-dev", "flux1-kontext"])
def test_the_model_is_fed_what_the_pipeline_feeds_it(models, encoded, pictures, variant):
    family = family_of(models / variant, guidance=2.5, min_t=0.999999)
    inputs = family.prepare_inputs(batch_of(encoded, "a#0"), Draw(0, 0)).inputs
    pipeline = reference.PIPELINES[variant].from_pretrained(models / variant)
    calls = recorded(pipeline.transformer)
    with torch.no_grad():
        reference.predict(pipeline.transformer, inputs)
    levels = ((pictures[1][:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    editing = {"image": Image.fromarray(levels.numpy()), "_auto_resize": False, "max_area": BUCKET.width * BUCKET.height}
    pipeline(
        prompt=CAPTION,
        height=BUCKET.height,
        width=BUCKET.width,
        num_inference_steps=1,
        guidance_scale=2.5,
        latents=reference.packed(inputs["x"]),
        output_type="latent",
        max_sequence_length=512,
        **(editing if variant == "flux1-kontext" else {}),
    )
    ours, theirs = calls
    assert theirs["hidden_states"].shape[1] == (48 if variant == "flux1-kontext" else 24)
    # Pixels go through 8 bits once more on the pipeline's side.
    torch.testing.assert_close(ours["hidden_states"], theirs["hidden_states"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["timestep"], theirs["timestep"], rtol=0, atol=2e-6)
    for name in ("encoder_hidden_states", "pooled_projections", "guidance", "txt_ids", "img_ids"):
        assert torch.equal(ours[name], theirs[name]), name


def test_schnell_is_given_no_guidance(models, encoded):
    inputs = family_of(models / "flux1-schnell").prepare_inputs(batch_of(encoded, "a#0"), Draw(0, 0)).inputs
    assert inputs.keys() == {"x", "t", "text", "pooled"}


def test_a_guidance_value_for_schnell_is_told_to_have_no_effect(models, caplog):
    family_of(models / "flux1-schnell")
    assert not caplog.records
    family_of(models / "flux1-schnell", guidance=3.5)
    assert "model.guidance has no effect" in caplog.text


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_and_target_follow_the_flow_path(models, encoded, variant):
    prepared = family_of(models / variant).prepare_inputs(batch_of(encoded, "a#0", "b#0"), Draw(0, 0))
    clean = encoded["latents"][:, 0]
    for index, key in enumerate(("a#0", "b#0")):
        t = prepared.inputs["t"][index]
        noise = Draw(0, 0).normal(key, "noise", tuple(clean.shape))
        noisy = prepared.inputs["x"][index]
        assert (noisy - (t * noise + (1 - t) * clean)).abs().max() < 1e-5
        # One Euler step from t to 0 along the target gives the clean latents.
        assert (noisy - t * prepared.target["velocity"][index] - clean).abs().max() < 1e-5
    assert {tensor.dtype for tensor in prepared.inputs.values()} == {torch.float32}
    assert prepared.inputs["t"][0] != prepared.inputs["t"][1]


def test_it_is_a_pure_function_of_seed_epoch_and_key(models, encoded):
    family = family_of(models / "flux1-kontext")
    one = family.prepare_inputs(batch_of(encoded, "a#0", "b#0"), Draw(1, 2))
    torch.rand(100)
    again = family.prepare_inputs(batch_of(encoded, "b#0", "a#0"), Draw(1, 2))
    assert torch.equal(one.inputs["x"][0], again.inputs["x"][1])
    other = family.prepare_inputs(batch_of(encoded, "a#1", "b#0"), Draw(1, 2))
    assert not torch.equal(one.inputs["x"][0], other.inputs["x"][0])
    assert torch.equal(one.inputs["x"][1], other.inputs["x"][1])


@pytest.mark.parametrize(
    ("variant", "options", "size", "shift"),
    [
        ("flux1-dev", {}, (128, 128), math.exp(1.15)),
        ("flux1-kontext", {}, (64, 64), math.exp(calculate_shift(1024))),  # of the target's tokens alone
        ("flux1-schnell", {}, (128, 128), 1.0),
        ("flux1-dev", {"shift": 2.0}, (128, 128), 2.0),
    ],
)
def test_the_shift_is_that_of_inference(models, encoded, variant, options, size, shift):
    height, width = size
    fields = {**encoded, "latents": torch.zeros(16, 1, height, width), "references": torch.zeros(1, 16, height, width)}
    [t] = family_of(models / variant, **options).prepare_inputs(batch_of(fields, "a#0"), Draw(0, 0)).inputs["t"]
    expected = TimestepDistribution("logit_normal", shift=shift).at(Draw(0, 0).quantile("a#0", "timestep"))
    assert float(t) == pytest.approx(expected, abs=1e-7)


def test_different_numbers_of_references_in_a_micro_batch_are_refused(models, encoded):
    batch = batch_of(encoded, "a#0", "b#0")
    batch.fields["references"][1] = batch.fields["references"][1].repeat(2, 1, 1, 1)
    with pytest.raises(UserError, match=r"a#0, b#0.*different numbers of reference pictures"):
        family_of(models / "flux1-kontext").prepare_inputs(batch, Draw(0, 0))


@pytest.mark.slow
def test_a_full_export_is_read_by_diffusers(tmp_path):
    """At the real width, which is the only one that diffusers' converter takes, with one block of each kind."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True, joint_attention_dim=32).to(
        torch.bfloat16
    )
    model.save_config(tmp_path / "config/transformer")
    weights = model.state_dict()
    file = export_full(
        tmp_path,
        "full",
        weights,
        expected={name: tuple(tensor.shape) for name, tensor in weights.items()},
        key_map=flux_key_map(),
        dtype=None,
        family={"modelspec.architecture": "flux-1-dev"},
        facts=TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-5, seed=0),
    )
    read = FluxTransformer2DModel.from_single_file(
        file, config=str(tmp_path / "config"), subfolder="transformer", torch_dtype=torch.bfloat16, local_files_only=True
    )
    assert read.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read.state_dict().items())


def test_pipelines_of_the_variants(models):
    assert type(FluxPipeline.from_pretrained(models / "flux1-dev")) is FluxPipeline
    kontext = FluxKontextPipeline.from_pretrained(models / "flux1-kontext")
    _, report = FluxTransformer2DModel.from_pretrained(models / "flux1-kontext/transformer", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert kontext.tokenizer.model_max_length == 77
