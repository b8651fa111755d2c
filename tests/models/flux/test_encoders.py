"""FLUX.1's frozen networks against diffusers' pipelines, on real pictures and with the real tokenizers."""

import shutil

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from PIL import Image

from models.flux import Family
from models.flux.tiny import RealTokenizers, write_tiny
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Bucket
from utils.errors import UserError

CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "released", "comfy")
BUCKET = Bucket(width=96, height=64, frames=1)
CAPTIONS = ["Two  men & a child’s bike,\n in the café — 自行车 🚲", "", "an Astronaut's smile " * 120, "<|endoftext|> </s> a cat"]


def family_of(path, **options) -> Family:
    return Family(Family.Options(type="flux", path=path, **{"dtype": "float32", **options}))


def encoders_of(path, **options) -> dict:
    return {encoder.name: encoder for encoder in family_of(path, **options).encoders()}


def loaded(path, name, **options):
    encoder = encoders_of(path, **options)[name]
    encoder.load(CPU)
    return encoder


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    """A Kontext model with the made tokenizers, in each layout."""
    root = tmp_path_factory.mktemp("flux")
    for layout in LAYOUTS:
        write_tiny("flux1-kontext", root / layout, layout, seed=3)
    return root


@pytest.fixture(scope="module")
def real(assets, tmp_path_factory):
    """The same with the real tokenizers, for dev and schnell."""
    root = tmp_path_factory.mktemp("flux-real")
    for variant in ("flux1-dev", "flux1-schnell"):
        tokenizers = RealTokenizers(assets.clip_tokenizer, assets.t5_tokenizer)
        write_tiny(variant, root / variant, "diffusers", seed=3, tokenizers=tokenizers)
    return root


@pytest.fixture(scope="module")
def pixels(assets):
    return load_pixels(DataFile(assets.images["astronaut.png"]), BUCKET)


@pytest.fixture(scope="module")
def control(assets):
    return load_pixels(DataFile(assets.images["coffee.png"]), BUCKET)


def test_all_layouts_give_the_same_bits(kontext, pixels, control):
    encoded = {}
    for layout in LAYOUTS:
        item = EncodeItem("a", caption=CAPTIONS[0], pixels=pixels, controls=(control, pixels))
        fields = {}
        for name in encoders_of(kontext / layout):
            fields |= loaded(kontext / layout, name).encode([item])[0]
        encoded[layout] = fields
    assert {name: tuple(tensor.shape) for name, tensor in encoded["diffusers"].items()} == {
        "latents": (16, 1, 8, 12),
        "pooled": (128,),
        "text": (512, 32),
        "references": (2, 16, 8, 12),
    }
    for layout in LAYOUTS[1:]:
        for name, tensor in encoded["diffusers"].items():
            assert torch.equal(encoded[layout][name], tensor), (layout, name)


@pytest.mark.parametrize("source", ["made tokenizers", "flux1-dev", "flux1-schnell"])
def test_text_is_the_pipelines(request, source):
    made = source == "made tokenizers"
    folder = request.getfixturevalue("kontext") / "diffusers" if made else request.getfixturevalue("real") / source
    length = 256 if source == "flux1-schnell" else 512
    pipeline = (FluxKontextPipeline if made else FluxPipeline).from_pretrained(folder, transformer=None, vae=None)
    clip, t5 = loaded(folder, "clip"), loaded(folder, "t5")
    for caption in CAPTIONS:
        with torch.no_grad():
            text, pooled, _ = pipeline.encode_prompt(caption, None, max_sequence_length=length)
        item = EncodeItem("a", caption=caption)
        assert torch.equal(clip.encode([item])[0]["pooled"], pooled[0])
        assert torch.equal(t5.encode([item])[0]["text"], text[0])
        assert text.shape == (1, length, 32)


def test_captions_do_not_depend_on_what_else_is_encoded(kontext):
    clip = loaded(kontext / "comfy", "clip")
    items = [EncodeItem(str(index), caption=caption) for index, caption in enumerate(CAPTIONS)]
    together = clip.encode(items)
    assert all(
        torch.equal(clip.encode([item])[0]["pooled"], fields["pooled"]) for item, fields in zip(items, together, strict=True)
    )
    assert not torch.equal(together[0]["pooled"], together[1]["pooled"])


def test_bfloat16_is_near(kontext):
    item = EncodeItem("a", caption=CAPTIONS[0])
    for name, field in {"clip": "pooled", "t5": "text"}.items():
        exact, rounded = (
            loaded(kontext / "released", name, dtype=dtype).encode([item])[0][field] for dtype in ("float32", "bfloat16")
        )
        assert rounded.dtype is torch.bfloat16
        assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_t5_from_its_sentencepiece_model(real, tmp_path):
    folder = shutil.copytree(real / "flux1-schnell", tmp_path / "model")
    (folder / "tokenizer_2/tokenizer.json").unlink()
    for caption in CAPTIONS[:3]:
        item = EncodeItem("a", caption=caption)
        one, other = (loaded(path, "t5").encode([item])[0]["text"] for path in (folder, real / "flux1-schnell"))
        assert torch.equal(one, other)


def test_latents_are_drawn_from_the_pipelines_distribution(kontext, pixels):
    """The noise is the picture's own; given it, diffusers' picture-to-picture pipeline has the same latents."""
    vae = loaded(kontext / "released", "vae")
    [fields] = vae.encode([EncodeItem("a", pixels=pixels)])
    [again] = vae.encode([EncodeItem("b", pixels=pixels.clone())])
    assert torch.equal(fields["latents"], again["latents"])

    pipeline = FluxImg2ImgPipeline.from_pretrained(kontext / "diffusers", text_encoder_2=None, transformer=None)
    image = pipeline.image_processor.preprocess(picture_of(pixels), height=BUCKET.height, width=BUCKET.width)
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(image, torch.Generator().manual_seed(0))
        distribution = pipeline.vae.encode(image).latent_dist
    noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    scale, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor
    torch.testing.assert_close((distribution.mean + distribution.std * noise - shift) * scale, theirs)
    own = (fields["latents"][:, 0] / scale + shift - distribution.mean[0]) / distribution.std[0]
    assert abs(own.mean()) < 0.1
    assert abs(own.std() - 1) < 0.1


def test_references_are_the_pipelines(kontext, control):
    pipeline = FluxKontextPipeline.from_pretrained(kontext / "diffusers", text_encoder_2=None, transformer=None)
    image = pipeline.image_processor.preprocess(picture_of(control), height=BUCKET.height, width=BUCKET.width)
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(image, None)
    [fields] = loaded(kontext / "comfy", "references").encode([EncodeItem("a", controls=(control,))])
    torch.testing.assert_close(fields["references"], theirs, rtol=1e-5, atol=1e-5)


def test_decode_is_the_pipelines(kontext, control):
    encoder = loaded(kontext / "released", "references")
    [fields] = encoder.encode([EncodeItem("a", controls=(control,))])
    pipeline = FluxKontextPipeline.from_pretrained(kontext / "diffusers", text_encoder_2=None, transformer=None)
    config = pipeline.vae.config
    with torch.no_grad():
        expected = pipeline.vae.decode(fields["references"] / config.scaling_factor + config.shift_factor).sample
    decoded = loaded(kontext / "released", "vae").decode(fields["references"].transpose(0, 1))
    assert decoded.shape == (3, 1, BUCKET.height, BUCKET.width)
    assert torch.equal(decoded[:, 0], expected[0])


def test_an_item_without_references_is_refused_before_anything_else_is_encoded(kontext):
    assert next(iter(encoders_of(kontext / "released"))) == "references"
    encoder = loaded(kontext / "released", "references")
    with pytest.raises(UserError, match=r"cat\.png.*control_path"):
        encoder.encode([EncodeItem("pictures/cat.png@96x64x1")])


def test_dev_has_no_references(real):
    assert set(encoders_of(real / "flux1-dev")) == {"vae", "clip", "t5"}


def test_fingerprints_tell_what_changes_the_output(kontext, real, tmp_path):
    folder = shutil.copytree(kontext / "diffusers", tmp_path / "model")
    before = {name: encoder.fingerprint() for name, encoder in encoders_of(folder).items()}
    assert len(set(before.values())) == 4
    assert encoders_of(folder)["clip"].fingerprint() == before["clip"]
    vocabulary = folder / "tokenizer/vocab.json"
    vocabulary.write_text(vocabulary.read_text().replace('"cat</w>"', '"cow</w>"'))
    after = {name: encoder.fingerprint() for name, encoder in encoders_of(folder).items()}
    assert [name for name in before if before[name] != after[name]] == ["clip"]
    t5_of_dev, t5_of_schnell = (encoders_of(real / variant)["t5"].fingerprint() for variant in ("flux1-dev", "flux1-schnell"))
    assert t5_of_dev != t5_of_schnell  # another length of text


def test_a_tokenizer_of_another_encoder_is_refused(kontext, real):
    encoder = encoders_of(kontext / "diffusers", tokenizer_path=real / "flux1-dev/tokenizer")["clip"]
    with pytest.raises(UserError, match=r"49408 tokens.*do not belong together"):
        encoder.load(CPU)


def picture_of(pixels) -> Image.Image:
    """The picture as it was before it became numbers in [-1, 1]."""
    return Image.fromarray(((pixels[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
