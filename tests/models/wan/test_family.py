"""``prepare_inputs`` against what diffusers' pipelines feed their model, and what the options do."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from models import load_family
from tests.models.wan import reference
from utils.config.dump import dump_table
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Batch, Bucket
from utils.draw import Draw
from utils.errors import UserError

BUCKET = Bucket(width=64, height=48, frames=9)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of each variant."""
    root = tmp_path_factory.mktemp("wan")
    Family = load_family("wan")
    for variant in Family.variants:
        (root / variant).mkdir()
        Family.write_tiny(variant, root / variant, "diffusers", seed=0)
    return root


@pytest.fixture(scope="module")
def model(models):
    return models / "wan-i2v"


def family_of(model, **options):
    Family = load_family("wan")
    return Family(Family.Options(type="wan", path=model, dtype="float32", **options))


@pytest.fixture(scope="module")
def clip(assets):
    """Pixels of a real clip."""
    return load_pixels(DataFile(assets.clips["carphone_pristine.mp4"]), BUCKET, 16.0)


def encode(model, pixels):
    item = EncodeItem(key="clip", caption="a man talks in a car", pixels=pixels)
    fields = {}
    for encoder in family_of(model).encoders():
        encoder.load(torch.device("cpu"))
        fields |= encoder.encode([item])[0]
        encoder.unload()
    return fields


@pytest.fixture(scope="module")
def encoded(model, clip):
    """The clip, and what the encoders make of it and a caption."""
    return clip, encode(model, clip)


def batch_of(fields, *keys: str) -> Batch:
    return Batch(keys=list(keys), fields={name: [value] * len(keys) for name, value in fields.items()})


def picture(pixels, frame):
    return Image.fromarray(((pixels[:, frame].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


@pytest.mark.parametrize("variant", ["wan-i2v", "wan-flf2v", "wan22-i2v"])
def test_mask_and_condition_are_those_of_the_diffusers_pipeline(models, clip, variant):
    pipeline = WanImageToVideoPipeline.from_pretrained(models / variant)
    size = {"height": BUCKET.height, "width": BUCKET.width}
    first, last = (pipeline.video_processor.preprocess(picture(clip, frame), **size) for frame in (0, -1))
    assert (first[0] - clip[:, 0]).abs().max() < 1e-5
    shown = {"last_image": last} if variant == "wan-flf2v" else {}
    _, theirs = pipeline.prepare_latents(first, 1, num_frames=BUCKET.frames, dtype=torch.float32, device="cpu", **shown, **size)
    inputs = family_of(models / variant).prepare_inputs(batch_of(encode(models / variant, clip), "clip#0"), Draw(0, 0)).inputs
    ours = inputs["x"]
    assert ours.shape == (1, 36, 3, 6, 8)
    assert (ours[:, 16:] - theirs).abs().max() < 1e-5
    assert ours[0, 16:20, 0].eq(1).all()
    assert ours[0, 16:19, 1:].eq(0).all()
    assert ours[0, 19, -1].eq(1 if shown else 0).all()
    assert {name: tensor.shape[1] for name, tensor in inputs.items() if name == "clip"} == {
        "wan-i2v": {"clip": 257},
        "wan-flf2v": {"clip": 514},
        "wan22-i2v": {},
    }[variant]


def test_a_clean_first_frame_as_in_the_diffusers_pipeline(models, clip):
    """x, the times of all tokens, and what counts in the loss."""
    model = models / "wan-ti2v"
    pipeline = WanImageToVideoPipeline.from_pretrained(model, image_encoder=None, image_processor=None)
    pixels = clip[:, :, :32, :]  # multiples of 32
    size = {"height": 32, "width": BUCKET.width}
    image = pipeline.video_processor.preprocess(picture(pixels, 0), **size)
    fields = encode(model, pixels)
    noise = Draw(0, 0).normal("clip#0", "noise", tuple(fields["latents"].shape))[None]
    _, condition, mask = pipeline.prepare_latents(
        image, 1, 48, num_frames=BUCKET.frames, dtype=torch.float32, device="cpu", latents=noise, **size
    )
    family = family_of(model, first_frame=True)
    prepared = family.prepare_inputs(batch_of(fields, "clip#0"), Draw(0, 0))
    t = prepared.inputs["t"][0, 1]
    noisy = (t * noise + (1000 - t) * fields["latents"]) / 1000
    theirs = (1 - mask) * condition + mask * noisy
    torch.testing.assert_close(prepared.inputs["x"], theirs, rtol=1e-5, atol=1e-5)
    times = (mask[0][0][:, ::2, ::2] * t).flatten()
    assert torch.equal(reference.times_by_token(family.build_transformer(), theirs, prepared.inputs["t"])[0], times)

    assert prepared.target["mask"].flatten().tolist() == [0, 1, 1]
    prediction = torch.randn(1, *fields["latents"].shape)
    later = (prediction - prepared.target["velocity"])[:, :, 1:].square().mean()
    torch.testing.assert_close(family.loss({"prediction": prediction}, prepared.target), later)


def test_without_a_clean_first_frame_there_is_one_time(models, clip):
    model = models / "wan-ti2v"
    fields = encode(model, clip[:, :, :32, :])
    noisy = family_of(model).prepare_inputs(batch_of(fields, "clip#0"), Draw(0, 0))
    assert noisy.inputs["t"].shape == (1,)
    assert set(noisy.target) == {"velocity"}
    assert not torch.equal(noisy.inputs["x"][0, :, 0], fields["latents"][:, 0])
    one = {**fields, "latents": fields["latents"][:, :1]}
    prepared = family_of(model, first_frame=True).prepare_inputs(batch_of(one, "picture#0"), Draw(0, 0))
    assert prepared.inputs["t"].shape == (1,)
    assert set(prepared.target) == {"velocity"}


def test_sizes_and_frame_rates(models):
    rules = {variant: family_of(models / variant).size_rules for variant in load_family("wan").variants}
    fifth = rules.pop("wan-ti2v")
    assert (fifth.multiple, fifth.frame_step, fifth.fps) == (32, 4, 24.0)
    assert {(rule.multiple, rule.frame_step, rule.fps) for rule in rules.values()} == {(16, 4, 16.0)}


@pytest.mark.parametrize(("variant", "boundary"), [("wan22-t2v", 0.875), ("wan22-i2v", 0.9)])
def test_each_expert_sees_its_own_timesteps(models, variant, boundary):
    model = models / variant
    drawn = {}
    for expert in ("high", "low"):
        family = family_of(model, expert=expert)
        times = torch.cat([family.prepare_inputs(reference.batch(family, i), Draw(i, 0)).inputs["t"] / 1000 for i in range(200)])
        low, high = (boundary, 1) if expert == "high" else (0, boundary)
        assert low <= times.min()
        assert times.max() <= high
        drawn[expert] = times
    assert drawn["low"].std() > 0.1
    everywhere = family_of(model, expert="high", min_t=0.0).timesteps
    assert (everywhere.low, everywhere.high) == (0.0, 1.0)
    lower_part = family_of(model, expert="low", max_t=0.5).timesteps
    assert (lower_part.low, lower_part.high) == (0.0, 0.5)
    with pytest.raises(UserError, match=rf"min_t = {boundary} and model.max_t = 0.5 leave no timestep to train"):
        family_of(model, expert="high", max_t=0.5)


def test_the_resolved_config_trains_the_same_timesteps(models):
    """A run's own copy of its settings holds no limits that were not given, so the expert can be changed in it."""
    family = family_of(models / "wan22-t2v", expert="low")
    options = type(family).Options(type="wan", path=models / "wan22-t2v", expert="low")
    assert "max_t" not in dump_table(options)
    assert (options.min_t, options.max_t) == (None, None)
    with pytest.raises(ValueError, match=r"it must be above min_t = 0\.5"):
        type(family).Options(type="wan", min_t=0.5, max_t=0.4)


def test_noise_and_target_follow_the_flow_path(model, encoded):
    _, fields = encoded
    prepared = family_of(model, shift=5.0).prepare_inputs(batch_of(fields, "a#0", "b#0"), Draw(0, 0))
    for index, key in enumerate(("a#0", "b#0")):
        t = prepared.inputs["t"][index] / 1000
        noise = Draw(0, 0).normal(key, "noise", tuple(fields["latents"].shape))
        noisy = prepared.inputs["x"][index, :16]
        assert (noisy - (t * noise + (1 - t) * fields["latents"])).abs().max() < 1e-5
        # One Euler step from t to 0 along the target gives the clean latents.
        assert (noisy - t * prepared.target["velocity"][index] - fields["latents"]).abs().max() < 1e-5
    assert prepared.inputs["t"].dtype is torch.float32
    assert prepared.inputs["t"][0] != prepared.inputs["t"][1]


def test_text_is_padded_with_zeros_to_512_and_clip_goes_along(model, encoded):
    _, fields = encoded
    inputs = family_of(model).prepare_inputs(batch_of(fields, "a#0"), Draw(0, 0)).inputs
    length = len(fields["text"])
    assert length < 40
    assert inputs["text"].shape[1] == 512
    assert torch.equal(inputs["text"][0, :length], fields["text"])
    assert not inputs["text"][0, length:].any()
    assert inputs["clip"].shape[1] == 257


def test_it_is_a_pure_function_of_seed_epoch_and_key(model, encoded):
    _, fields = encoded
    family = family_of(model)
    one = family.prepare_inputs(batch_of(fields, "a#0", "b#0"), Draw(1, 2))
    torch.rand(100)
    again = family.prepare_inputs(batch_of(fields, "b#0", "a#0"), Draw(1, 2))
    assert torch.equal(one.inputs["x"][0], again.inputs["x"][1])
    other = family.prepare_inputs(batch_of(fields, "a#1", "b#0"), Draw(1, 2))
    assert not torch.equal(one.inputs["x"][0], other.inputs["x"][0])
    assert torch.equal(one.inputs["x"][1], other.inputs["x"][1])


def test_timestep_options(model, encoded):
    _, fields = encoded

    def times(**options) -> torch.Tensor:
        keys = [f"{index}#0" for index in range(64)]
        return family_of(model, **options).prepare_inputs(batch_of(fields, *keys), Draw(0, 0)).inputs["t"] / 1000

    assert times(shift=8.0).mean() > times(shift=1.0).mean() + 0.1
    low = times(max_t=0.4, min_t=0.1)
    assert low.min() >= 0.1
    assert low.max() <= 0.4
    assert times(timestep_sample_method="uniform", shift=1.0).std() > times(shift=1.0).std()


def test_weights_that_diffusers_keeps_in_fp32_stay_so_in_bf16(model):
    Family = load_family("wan")
    with torch.device("meta"):
        transformer = Family(Family.Options(type="wan", path=model)).build_transformer()
    dtypes = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] is torch.bfloat16
    for name in ("blocks.0.scale_shift_table", "blocks.0.norm2.weight", "condition_embedder.time_embedder.linear_1.weight"):
        assert dtypes[name] is torch.float32
