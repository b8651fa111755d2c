"""``prepare_inputs`` against what diffusers' pipelines feed their model, and what the options do."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from models import load_family
from models.qwen_image import encoders
from tests.models.qwen_image.pipelines import opened, picture_of
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Batch, Bucket
from utils.draw import Draw
from utils.errors import UserError

Family = load_family("qwen_image")
CPU = torch.device("cpu")
BUCKET = Bucket(width=96, height=64, frames=1)
CAPTION = "Put a red hat on the cat — 给猫戴上帽子 🎩"
AREA = 96 * 64
NUM_CONTROLS = {"qwen-image": 0, "qwen-image-edit": 1, "qwen-image-edit-plus": 2, "qwen-image-edit-2511": 3}


def family_of(folder, **options):
    return Family(Family.Options(type="qwen_image", path=folder, dtype="float32", **options))


@pytest.fixture(scope="module")
def pictures(assets):
    names = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
    return [load_pixels(DataFile(assets.images[name]), BUCKET) for name in names]


@pytest.fixture
def small(monkeypatch):
    """The size that the editing pipelines scale pictures to (a megapixel) made that of the bucket, there and here."""
    exact = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: exact(AREA, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setitem(encoders.PROMPTS, "qwen-image-edit", (encoders.PROMPTS["qwen-image-edit"][0], {"area": AREA}))


def encoded(family, pictures) -> dict[str, torch.Tensor]:
    item = EncodeItem(key="a", caption=CAPTION, pixels=pictures[0], controls=tuple(pictures[1:]))
    fields = {}
    for encoder in family.encoders():
        encoder.load(CPU)
        fields |= encoder.encode([item])[0]
        encoder.unload()
    return fields


def batch_of(fields, *keys: str) -> Batch:
    return Batch(keys=list(keys), fields={name: [value] * len(keys) for name, value in fields.items()})


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.parametrize("variant", Family.variants)
def test_inputs_are_those_of_the_pipeline(tiny_qwen, pictures, small, variant, layout, measured):
    """A whole call of the pipeline, and what its transformer was given in the first step."""
    shown = pictures[: 1 + NUM_CONTROLS[variant]]
    pipeline = opened(variant, tiny_qwen(variant))
    given = {}

    def look(module, arguments, keywords):
        if not given:
            given.update(keywords)

    pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    images = [picture_of(picture) for picture in shown[1:]]
    editing = {"image": images[0] if len(images) == 1 else images} if images else {}
    size = {"height": BUCKET.height, "width": BUCKET.width}
    pipeline(prompt=CAPTION, **editing, **size, num_inference_steps=2, true_cfg_scale=1.0, output_type="latent")

    family = family_of(tiny_qwen(variant, layout))
    inputs = family.prepare_inputs(batch_of(encoded(family, shown), "a#0"), Draw(0, 0)).inputs
    assert inputs["x"].shape == given["hidden_states"].shape
    target = BUCKET.width * BUCKET.height // 256
    torch.testing.assert_close(inputs["x"][:, target:], given["hidden_states"][:, target:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs["text"], given["encoder_hidden_states"], rtol=1e-5, atol=1e-5)
    text = (inputs["text"] - given["encoder_hidden_states"]).abs()
    references = (inputs["x"][:, target:] - given["hidden_states"][:, target:]).abs()
    measured(variant, "inputs", max(float(part.max()) for part in (references, text) if part.numel()))
    assert given["encoder_hidden_states_mask"] is None
    assert "text_mask" not in inputs
    assert [tuple(grid) for grid in inputs["grids"].tolist()] == given["img_shapes"][0]
    assert 0 < inputs["t"] < 1
    assert given["timestep"].item() == pytest.approx(1.0)  # the first step is at pure noise


def test_noise_and_target_follow_the_flow_path(tiny_qwen, pictures):
    family = family_of(tiny_qwen("qwen-image"), shift=5.0)
    fields = encoded(family, pictures[:1])
    prepared = family.prepare_inputs(batch_of(fields, "a#0", "b#0"), Draw(0, 0))
    assert prepared.target["velocity"].shape == (2, 16, 1, 8, 12)
    for index, key in enumerate(("a#0", "b#0")):
        t = prepared.inputs["t"][index]
        noise = Draw(0, 0).normal(key, "noise", tuple(fields["latents"].shape))
        tokens = prepared.inputs["x"][index : index + 1]
        noisy = QwenImagePipeline._unpack_latents(tokens, height=64, width=96, vae_scale_factor=8)[0]
        assert (noisy - (t * noise + (1 - t) * fields["latents"])).abs().max() < 1e-5
        # One Euler step from t to 0 along the target gives the clean latents.
        assert (noisy - t * prepared.target["velocity"][index] - fields["latents"]).abs().max() < 1e-5
    assert prepared.inputs["t"].dtype is torch.float32
    assert prepared.inputs["t"][0] != prepared.inputs["t"][1]


def test_captions_of_different_lengths_are_padded_and_masked(tiny_qwen):
    family = family_of(tiny_qwen("qwen-image"))
    texts = [torch.randn(length, 256) for length in (3, 5)]
    batch = Batch(keys=["a#0", "b#0"], fields={"latents": [torch.zeros(16, 1, 4, 4)] * 2, "text": texts})
    inputs = family.prepare_inputs(batch, Draw(0, 0)).inputs
    assert inputs["text_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    for row, text in zip(inputs["text"], texts, strict=True):
        assert torch.equal(row[: len(text)], text)
        assert not row[len(text) :].any()


def test_it_is_a_pure_function_of_seed_epoch_and_key(tiny_qwen, pictures):
    family = family_of(tiny_qwen("qwen-image-edit-plus"))
    fields = encoded(family, pictures[:2])
    one = family.prepare_inputs(batch_of(fields, "a#0", "b#0"), Draw(1, 2))
    torch.rand(100)
    again = family.prepare_inputs(batch_of(fields, "b#0", "a#0"), Draw(1, 2))
    assert torch.equal(one.inputs["x"][0], again.inputs["x"][1])
    other = family.prepare_inputs(batch_of(fields, "a#1", "b#0"), Draw(1, 2))
    assert not torch.equal(one.inputs["x"][0], other.inputs["x"][0])
    assert torch.equal(one.inputs["x"][1], other.inputs["x"][1])


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (1664, 928), (1328, 1344)])
def test_the_shift_is_the_release_schedulers(tiny_qwen, width, height):
    folder = tiny_qwen("qwen-image")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    tokens = width * height // 256
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = pipeline_qwenimage.calculate_shift(tokens, *(scheduler.config[name] for name in names))
    expected = scheduler.time_shift(mu, 1.0, torch.tensor(0.5))
    batch = Batch(keys=["a#0"], fields={"latents": [torch.zeros(16, 1, height // 8, width // 8)], "text": [torch.zeros(2, 256)]})
    middle = Draw(0, 0, fixed_time=0.5)
    assert family_of(folder).prepare_inputs(batch, middle).inputs["t"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert family_of(folder, shift=3.0).prepare_inputs(batch, middle).inputs["t"].item() == pytest.approx(0.75)


def test_references_have_no_influence_on_the_shift(tiny_qwen, pictures):
    family = family_of(tiny_qwen("qwen-image-edit-plus"))
    times = [
        family.prepare_inputs(batch_of(encoded(family, pictures[: 1 + number]), "a#0"), Draw(0, 0)).inputs["t"] for number in (1, 3)
    ]
    assert torch.equal(*times)


def test_different_numbers_of_references_do_not_go_together(tiny_qwen, pictures):
    family = family_of(tiny_qwen("qwen-image-edit-plus"))
    first, second = (encoded(family, pictures[: 1 + number]) for number in (1, 2))
    batch = Batch(keys=["a#0", "b#0"], fields={name: [first[name], second[name]] for name in first})
    with pytest.raises(UserError, match=r"1 and 2 control pictures .* micro_batch_size_per_gpu = 1"):
        family.prepare_inputs(batch, Draw(0, 0))
