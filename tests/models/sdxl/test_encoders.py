"""SDXL's frozen networks against diffusers' pipeline, on real pictures and with the real tokenizer."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from models.sdxl import Family
from models.sdxl.encoders import time_ids
from models.sdxl.tiny import write_tiny
from utils.config.schema import DatasetConfig
from utils.data.cache import DatasetCache
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.sources.scan import scan
from utils.data.values import CENTRE, Bucket, Framing

CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "released", "comfy")
BUCKET = Bucket(width=96, height=64, frames=1)
CAPTION = "Two  men & a child’s bike,\n in the café — 自行车 🚲"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with the made tokenizer, in each layout."""
    root = tmp_path_factory.mktemp("sdxl")
    for layout in LAYOUTS:
        write_tiny("sdxl", root / layout, layout, seed=3)
    return root


@pytest.fixture(scope="module")
def real(assets, tmp_path_factory):
    """The same with CLIP's real tokenizer."""
    root = tmp_path_factory.mktemp("sdxl-real")
    write_tiny("sdxl", root, "diffusers", seed=3, tokenizer=assets.clip_tokenizer)
    return root


@pytest.fixture(scope="module")
def pixels(assets):
    return load_pixels(DataFile(assets.images["astronaut.png"]), BUCKET)


def encoders_of(path, **options) -> dict:
    family = Family(Family.Options(type="sdxl", path=path, **{"dtype": "float32", **options}))
    return {encoder.name: encoder for encoder in family.encoders()}


def encode(path, item: EncodeItem, *names: str, **options) -> dict[str, torch.Tensor]:
    fields = {}
    for name, encoder in encoders_of(path, **options).items():
        if name in (names or (name,)):
            encoder.load(CPU)
            fields |= encoder.encode([item])[0]
            encoder.unload()
    return fields


class Texts:
    """Both text encoders, loaded, as a function."""

    def __init__(self, path, **options):
        self.encoders = [encoders_of(path, **options)[name] for name in ("clip_l", "clip_g")]
        for encoder in self.encoders:
            encoder.load(CPU)

    def __call__(self, caption: str) -> dict[str, torch.Tensor]:
        return {
            name: value
            for encoder in self.encoders
            for name, value in encoder.encode([EncodeItem("a", caption=caption)])[0].items()
        }


def test_all_layouts_give_the_same_bits(models, pixels):
    item = EncodeItem("a", caption=CAPTION, pixels=pixels, original_size=(512, 512))
    encoded = {layout: encode(models / layout, item) for layout in LAYOUTS}
    fields = encoded["diffusers"]
    assert {name: tuple(value.shape) for name, value in fields.items()} == {
        "latents": (4, 1, 8, 12),
        "time_ids": (6,),
        "text_l": (77, 64),
        "text_g": (77, 128),
        "pooled": (128,),
    }
    for layout in LAYOUTS:
        assert all(torch.equal(encoded[layout][name], value) for name, value in fields.items()), layout


def test_latents_are_the_pipelines_distribution(models, pixels):
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(models / "diffusers")
    picture = Image.fromarray(((pixels[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    image = pipeline.image_processor.preprocess(picture, height=BUCKET.height, width=BUCKET.width)
    with torch.no_grad():
        distribution = pipeline.vae.encode(image).latent_dist
    latents = encode(models / "released", EncodeItem("a", pixels=pixels), "vae")["latents"][:, 0]
    noise = (latents / 0.13025 - distribution.mean[0]) / distribution.std[0]
    # Drawn from the distribution, as the model was trained: the difference from its mean is normal noise.
    assert abs(float(noise.mean())) < 0.2
    assert float(noise.std()) == pytest.approx(1, abs=0.15)
    again = encode(models / "released", EncodeItem("b", pixels=pixels), "vae")["latents"][:, 0]
    assert torch.equal(again, latents)


def test_the_vae_stays_in_fp32(models, pixels):
    item = EncodeItem("a", pixels=pixels)
    low = encode(models / "released", item, "vae", dtype="bfloat16")
    assert torch.equal(low["latents"], encode(models / "released", item, "vae")["latents"])


def test_decode_is_the_vaes(models, pixels):
    vae = encoders_of(models / "released")["vae"]
    vae.load(CPU)
    latents = vae.encode([EncodeItem("a", pixels=pixels)])[0]["latents"]
    reference = StableDiffusionXLPipeline.from_pretrained(models / "diffusers").vae
    with torch.no_grad():
        expected = reference.decode(latents[:, 0][None] / 0.13025).sample[0]
    decoded = vae.decode(latents)
    assert decoded.shape == (3, 1, BUCKET.height, BUCKET.width)
    assert torch.equal(decoded[:, 0], expected)


@pytest.mark.parametrize("made", [True, False], ids=["made tokenizer", "real tokenizer"])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_text_is_the_pipelines(request, made, clip_skip):
    root = request.getfixturevalue("models") / "diffusers" if made else request.getfixturevalue("real")
    pipeline = StableDiffusionXLPipeline.from_pretrained(root)
    texts = Texts(root, clip_skip=clip_skip)
    for caption in (CAPTION if not made else "a cat & the red dog, 3 of them", "a man talks in a car", ""):
        with torch.no_grad():
            hidden, _, pooled, _ = pipeline.encode_prompt(
                caption, device=CPU, do_classifier_free_guidance=False, clip_skip=clip_skip or None
            )
        fields = texts(caption)
        torch.testing.assert_close(torch.cat([fields["text_l"], fields["text_g"]], dim=-1), hidden[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fields["pooled"], pooled[0], rtol=1e-5, atol=1e-5)


def test_long_captions_are_read_in_chunks(real):
    """75 tokens at a time, each chunk as a caption of its own; the pooled state is the first one's."""
    words = " ".join(f"{colour} cat" for colour in ["red", "blue", "green", "white", "black"] * 20)  # 200 tokens
    parts = [" ".join(words.split()[start : start + 75]) for start in (0, 75, 150)]
    texts = Texts(real)
    whole = texts(words)
    assert whole["text_l"].shape[0] == whole["text_g"].shape[0] == 3 * 77
    for index, part in enumerate(parts):
        alone = texts(part)
        for name in ("text_l", "text_g"):
            assert torch.equal(whole[name][77 * index : 77 * (index + 1)], alone[name])
    assert torch.equal(whole["pooled"], texts(parts[0])["pooled"])
    assert texts(" ".join(["cat"] * 75))["text_l"].shape[0] == 77
    assert texts(" ".join(["cat"] * 76))["text_l"].shape[0] == 2 * 77
    cut = Texts(real, max_prompt_chunks=2)(words)
    assert torch.equal(cut["text_g"], whole["text_g"][: 2 * 77])


def test_real_tokens(real):
    """OpenAI's ids; text encoder 2 pads with token 0."""
    for name, pad in {"clip_l": 49407, "clip_g": 0}.items():
        encoder = encoders_of(real)[name]
        encoder.load(CPU)
        assert encoder.token_ids("an astronaut riding a horse").tolist() == [
            [49406, 550, 18376, 6765, 320, 4558, 49407, *[pad] * 70]
        ]


def test_what_changes_the_text_changes_the_fingerprint(models):
    prints = {
        encoders_of(models / "released", **options)["clip_g"].fingerprint()
        for options in ({}, {"clip_skip": 1}, {"max_prompt_chunks": 1}, {"dtype": "bfloat16"})
    }
    assert len(prints) == 4
    assert encoders_of(models / "released")["clip_l"].fingerprint() not in prints


def test_original_size_and_crop_come_from_the_file(models, assets, tmp_path):
    """rocket.jpg has 640x427 pixels: it is scaled to 96x64, of which a square loses 16 on the left; a wide one loses more above."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rocket.jpg").write_bytes(assets.images["rocket.jpg"].read_bytes())
    (tmp_path / "data/rocket.txt").write_text("a rocket")
    family = Family(Family.Options(type="sdxl", path=models / "released", dtype="float32"))
    settings = {"directory": [{"path": str(tmp_path / "data")}], "size_buckets": [[96, 64, 1], [64, 64, 1], [128, 32, 1]]}
    encoders = family.encoders()[:1]
    cache = DatasetCache(tmp_path / "cache")
    found = {}
    for size in settings["size_buckets"]:
        samples = scan(
            DatasetConfig.model_validate({**settings, "size_buckets": [size]}), family.size_rules, hash_cache=None
        ).samples
        cache.build(samples, encoders, device=CPU)
        found[tuple(size[:2])] = cache.read(samples[0], encoders)["time_ids"].tolist()
    assert found == {
        (96, 64): [427, 640, 0, 0, 64, 96],
        (64, 64): [427, 640, 0, 16, 64, 64],
        (128, 32): [427, 640, 26, 0, 32, 128],
    }


def test_unknown_sizes_are_those_of_the_picture(models, pixels):
    ids = encode(models / "released", EncodeItem("a", pixels=pixels), "vae")["time_ids"]
    assert ids.tolist() == [64, 96, 0, 0, 64, 96]


def test_time_ids_follow_the_framing(pixels):
    """A file of 600x400 pixels, trained at 96x64, the size that ``pixels`` have."""

    def ids(framing: Framing) -> list[int]:
        return time_ids(EncodeItem("a", pixels=pixels, original_size=(600, 400), framing=framing)).tolist()

    assert ids(CENTRE) == ids(Framing(x=0.0)) == [400, 600, 0, 0, 64, 96]  # nothing is cut
    # A square box of 300 pixels is scaled by 96/300, of which 32 lines are too much; it begins at 32 x 16 of the scaled file.
    box = (100, 50, 400, 350)
    assert ids(Framing(box)) == [400, 600, 16 + 16, 32, 64, 96]
    assert ids(Framing(box, y=0.0)) == [400, 600, 16, 32, 64, 96]
    assert ids(Framing(box, y=1.0)) == [400, 600, 16 + 32, 32, 64, 96]
    # A flat one of 600x100 by 64/100, of which 288 columns are too much; it begins 192 lines below the top.
    assert ids(Framing((0, 300, 600, 400), x=0.25)) == [400, 600, 192, 72, 64, 96]
    # Without a known size the picture is its own.
    assert time_ids(EncodeItem("a", pixels=pixels, framing=Framing(box))).tolist() == [64, 96, 0, 0, 64, 96]
