"""``prepare_inputs`` against what diffusers' pipelines feed their model, and what the options do."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from models import load_family
from utils.data.encoders import EncodeItem
from utils.data.media import load_pixels
from utils.data.values import Batch, Bucket
from utils.draw import Draw

BUCKET = Bucket(width=64, height=48, frames=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan-i2v")
    load_family("wan").write_tiny("wan-i2v", folder, "diffusers", seed=0)
    return folder


def family_of(model, **options):
    Family = load_family("wan")
    return Family(Family.Options(type="wan", path=model, dtype="float32", **options))


@pytest.fixture(scope="module")
def encoded(model, assets):
    """Pixels of a real clip, and what the encoders make of it and a caption."""
    pixels = load_pixels(assets.clips["carphone_pristine.mp4"], BUCKET, 16.0, "single_beginning")
    item = EncodeItem(key="clip", caption="a man talks in a car", pixels=pixels)
    fields = {}
    for encoder in family_of(model).encoders():
        encoder.load(torch.device("cpu"))
        fields |= encoder.encode([item])[0]
        encoder.unload()
    return pixels, fields


def batch_of(fields, *keys: str) -> Batch:
    return Batch(keys=list(keys), fields={name: [value] * len(keys) for name, value in fields.items()})


def test_mask_and_condition_are_those_of_the_diffusers_pipeline(model, encoded):
    pixels, fields = encoded
    pipeline = WanImageToVideoPipeline.from_pretrained(model)
    first = Image.fromarray(((pixels[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    image = pipeline.video_processor.preprocess(first, height=BUCKET.height, width=BUCKET.width)
    assert (image[0] - pixels[:, 0]).abs().max() < 1e-5
    _, theirs = pipeline.prepare_latents(
        image, 1, height=BUCKET.height, width=BUCKET.width, num_frames=BUCKET.frames, dtype=torch.float32, device="cpu"
    )
    ours = family_of(model).prepare_inputs(batch_of(fields, "clip#0"), Draw(0, 0)).inputs["x"]
    assert ours.shape == (1, 36, 3, 6, 8)
    assert (ours[:, 16:] - theirs).abs().max() < 1e-5
    assert ours[0, 16:20, 0].eq(1).all()
    assert ours[0, 16:20, 1:].eq(0).all()


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
