"""SD3's frozen networks against diffusers' pipeline, on real pictures and with the real tokenizers."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image

from models.sd3 import Family
from models.sd3.tiny import RealTokenizers, write_tiny
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Batch, Bucket
from utils.draw import Draw, generator
from utils.errors import UserError

CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "released", "comfy")
BUCKET = Bucket(width=96, height=64, frames=1)
CAPTIONS = ["Two  men & a child’s bike,\n in the café — 自行车 🚲", "", "an Astronaut's smile " * 120, "<|endoftext|> </s> a cat"]
VARIANT = "sd3-medium"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with the made tokenizers, in each layout; that of the release is one file."""
    root = tmp_path_factory.mktemp("sd3")
    for layout in LAYOUTS:
        write_tiny(VARIANT, root / layout, layout, seed=3)
    return root


@pytest.fixture(scope="module")
def real(assets, tmp_path_factory):
    """The same with the real tokenizers."""
    folder = tmp_path_factory.mktemp("sd3-real")
    write_tiny(VARIANT, folder, "diffusers", seed=3, tokenizers=RealTokenizers(assets.clip_tokenizer, assets.t5_tokenizer))
    return folder


@pytest.fixture(scope="module")
def pixels(assets):
    return load_pixels(DataFile(assets.images["astronaut.png"]), BUCKET)


def family_of(path, **options) -> Family:
    return Family(Family.Options(type="sd3", path=path, **{"dtype": "float32", **options}))


def encode(path, item) -> dict:
    """All encoders' fields of one item."""
    fields = {}
    for encoder in family_of(path).encoders():
        encoder.load(CPU)
        fields |= encoder.encode([item])[0]
        encoder.unload()
    return fields


def prepared(path, *captions, **options) -> list[dict]:
    """What the model is given with each of the captions, all but the picture."""
    family = family_of(path, **options)
    fields = [{"latents": torch.zeros(16, 1, 4, 4)} for _ in captions]
    for encoder in family.encoders()[1:]:
        encoder.load(CPU)
        for merged, made in zip(fields, encoder.encode([EncodeItem("a", caption=caption) for caption in captions]), strict=True):
            merged |= made
    batches = [Batch(keys=["a#0"], fields={name: [value] for name, value in merged.items()}) for merged in fields]
    return [family.prepare_inputs(batch, Draw(0, 0)).inputs for batch in batches]


def text_pipeline(path, **parts):
    return StableDiffusion3Pipeline.from_pretrained(path, vae=None, **parts)


def pipelines_text(pipeline, caption, max_tokens=256):
    """(prompt_embeds, pooled_prompt_embeds) as the pipeline hands them to its transformer."""
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            caption, None, None, device=CPU, do_classifier_free_guidance=False, max_sequence_length=max_tokens
        )
    return text, pooled


def assert_same(inputs, expected, tolerance=2e-6):
    """Bits may differ by where in memory a matrix lies."""
    for name, tensor in zip(("text", "pooled"), expected, strict=True):
        assert inputs[name].dtype is tensor.dtype
        assert inputs[name].shape == tensor.shape
        assert (inputs[name] - tensor).abs().max() <= tolerance, name


def test_all_layouts_give_the_same_bits(models, pixels):
    encoded = {layout: encode(models / layout, EncodeItem("a", caption=CAPTIONS[0], pixels=pixels)) for layout in LAYOUTS}
    assert {name: tuple(tensor.shape) for name, tensor in encoded["diffusers"].items()} == {
        "latents": (16, 1, 8, 12),
        "clip_l": (77, 192),
        "clip_l_pooled": (192,),
        "clip_g": (77, 320),
        "clip_g_pooled": (320,),
        "text": (256, 512),
    }
    for layout in LAYOUTS[1:]:
        for name, tensor in encoded["diffusers"].items():
            assert torch.equal(encoded[layout][name], tensor), (layout, name)


@pytest.mark.parametrize("made", [True, False], ids=["made tokenizers", "real tokenizers"])
def test_text_is_the_pipelines(request, made):
    folder = request.getfixturevalue("models") / "diffusers" if made else request.getfixturevalue("real")
    pipeline = text_pipeline(folder)
    for caption, inputs in zip(CAPTIONS, prepared(folder, *CAPTIONS), strict=True):
        assert inputs["text"].shape == (1, 77 + 256, 512)
        assert_same(inputs, pipelines_text(pipeline, caption))


def test_length_of_t5_is_an_option(models):
    [inputs] = prepared(models / "diffusers", CAPTIONS[0], t5_max_tokens=77)
    assert_same(inputs, pipelines_text(text_pipeline(models / "diffusers"), CAPTIONS[0], max_tokens=77))


def test_without_t5_as_the_pipeline_without_it(models):
    expected = pipelines_text(text_pipeline(models / "diffusers", text_encoder_3=None, tokenizer_3=None), CAPTIONS[0])
    [inputs] = prepared(models / "diffusers", CAPTIONS[0], t5=False)
    assert_same(inputs, expected)
    assert not inputs["text"][:, 77:].any()


def test_text_in_bf16_is_the_pipelines(models):
    expected = pipelines_text(text_pipeline(models / "diffusers", torch_dtype=torch.bfloat16), CAPTIONS[0])
    [inputs] = prepared(models / "comfy", CAPTIONS[0], dtype="bfloat16")
    assert_same(inputs, expected, tolerance=0.05)


def test_latents_are_the_pipelines(models, pixels):
    """A draw of the VAE's distribution with our noise; its mean and deviation, the shift and the scale are the pipeline's."""
    pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(
        models / "diffusers", text_encoder=None, text_encoder_2=None, text_encoder_3=None, transformer=None
    )
    picture = Image.fromarray(((pixels[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
    image = pipeline.image_processor.preprocess(picture)
    assert torch.allclose(image[0], pixels[:, 0], atol=1e-6)
    with torch.no_grad():
        distribution = pipeline.vae.encode(pixels[:, 0][None]).latent_dist
    shift, scale = pipeline.vae.config.shift_factor, pipeline.vae.config.scaling_factor
    assert (shift, scale) == (0.0609, 1.5305)
    vae = family_of(models / "comfy").encoders()[0]
    vae.load(CPU)
    latents = vae.encode([EncodeItem("a", pixels=pixels)])[0]["latents"]
    noise = ((latents[:, 0] / scale + shift) - distribution.mean[0]) / distribution.std[0]
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1


def test_decode_is_the_pipelines(models):
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        models / "diffusers", text_encoder=None, text_encoder_2=None, text_encoder_3=None, transformer=None
    )
    latents = torch.randn(16, 1, 4, 6, generator=generator("decode"))
    vae = family_of(models / "comfy").encoders()[0]
    vae.load(CPU)
    config = pipeline.vae.config
    with torch.no_grad():
        expected = pipeline.vae.decode(latents[:, 0][None] / config.scaling_factor + config.shift_factor).sample
    decoded = vae.decode(latents)
    assert decoded.shape == (3, 1, 32, 48)
    assert torch.equal(decoded[:, 0], expected[0])


def test_the_vae_is_fp32_whatever_the_dtype(models):
    assert family_of(models / "comfy", dtype="bfloat16").encoders()[0].dtype is torch.float32


def test_what_decides_the_output_is_in_the_fingerprints(models, tmp_path):
    def fingerprints(path, **options):
        return {encoder.name: encoder.fingerprint() for encoder in family_of(path, **options).encoders()}

    usual = fingerprints(models / "diffusers")
    assert len(set(usual.values())) == 4
    moved = shutil.copytree(models / "diffusers", tmp_path / "moved")
    assert fingerprints(moved) == usual
    shorter = fingerprints(moved, t5_max_tokens=77)
    assert {name for name in usual if shorter[name] != usual[name]} == {"t5"}
    vocabulary = json.loads((moved / "tokenizer/vocab.json").read_text())
    (moved / "tokenizer/vocab.json").write_text(json.dumps(dict(reversed(vocabulary.items()))))
    changed = fingerprints(moved)
    assert {name for name in usual if changed[name] != usual[name]} == {"clip_l", "clip_g"}


def test_a_tokenizer_that_is_too_large_is_refused(models, assets):
    encoder = family_of(models / "released", tokenizer_path=assets.clip_tokenizer).encoders()[1]
    with pytest.raises(UserError, match="49408 tokens, the text encoder knows"):
        encoder.load(CPU)
