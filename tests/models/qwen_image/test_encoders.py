"""Qwen-Image's frozen networks against diffusers' pipelines, with real pictures and the real tokenizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)

from models import load_family
from models.common.text_encoders import QWEN_NAMES, find_tokenizer
from models.qwen_image.encoders import prompt_of, qwen_encoders
from models.qwen_image.files import VARIANTS, find_files
from models.qwen_image.tiny import write_tiny
from tests.models.qwen_image.pipelines import opened, picture_of
from utils.config.schema import ModelOptions
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Bucket
from utils.errors import UserError

Family = load_family("qwen_image")
CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "released", "comfy")
CAPTIONS = ("Put a red hat on the cat — 给猫戴上帽子 🎩", "it's\n\n 2 dogs {in} a car", "")


@pytest.fixture(scope="module")
def pictures(assets):
    """Wide and tall ones."""
    sizes = {"chelsea.png": (160, 96), "rocket.jpg": (96, 128), "astronaut.png": (64, 64)}
    return [load_pixels(DataFile(assets.images[name]), Bucket(*size, frames=1)) for name, size in sizes.items()]


@pytest.fixture(scope="module")
def real_tokenizer(assets):
    """The released tokenizer, loaded."""
    return find_tokenizer(assets.qwen_tokenizer, QWEN_NAMES).load(max_tokens=10000)


@pytest.fixture(scope="module")
def real_model(assets, tmp_path_factory):
    """An Edit-Plus model with the released tokenizer, and a text encoder of its vocabulary."""
    folder = tmp_path_factory.mktemp("qwen-real")
    write_tiny("qwen-image-edit-plus", folder, "diffusers", seed=3, tokenizer=assets.qwen_tokenizer)
    return folder


def encoders_of(path, dtype=torch.float32):
    found = qwen_encoders(find_files(ModelOptions(type="qwen_image", path=path)), dtype)
    return {encoder.name: encoder for encoder in found}


def loaded(path, name="text", dtype=torch.float32):
    encoder = encoders_of(path, dtype)[name]
    encoder.load(CPU)
    return encoder


def texts_of(path, *captions, controls=(), dtype=torch.float32):
    items = [EncodeItem(key=caption, caption=caption, controls=tuple(controls)) for caption in captions]
    return [fields["text"] for fields in loaded(path, dtype=dtype).encode(items)]


def test_what_each_variant_reads(tiny_qwen):
    """Only editing looks at control pictures."""
    reads = {variant: {e.name: e.reads for e in encoders_of(tiny_qwen(variant)).values()} for variant in VARIANTS}
    editing = {"vae": "pixels", "control_vae": "controls", "text": "caption and controls"}
    assert reads == dict.fromkeys(VARIANTS[1:], editing) | {"qwen-image": {"vae": "pixels", "text": "caption"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dropped_tokens_are_the_template_up_to_the_users_turn(real_tokenizer, variant):
    """With the released tokenizer: 34 for making pictures, 64 for editing them."""
    prompt = prompt_of(variant)
    start = prompt.template.partition("<|im_start|>user\n")
    assert prompt.drop == len(real_tokenizer(start[0] + start[1])) == (34 if variant == "qwen-image" else 64)
    assert prompt.max_tokens == 1024 + prompt.drop


def test_real_tokens(real_tokenizer):
    """Ids that are known of the released tokenizer."""
    assert real_tokenizer("Hello world<|im_end|>\n") == [9707, 1879, 151645, 198]
    assert real_tokenizer("<|vision_start|><|image_pad|><|vision_end|>") == [151652, 151655, 151653]


def test_vocabulary_and_merges_are_the_same_tokenizer(assets, real_tokenizer, tmp_path):
    """As the release has it: ``vocab.json`` and ``merges.txt``, without the special tokens."""
    model = json.loads((assets.qwen_tokenizer / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    tokenize = find_tokenizer(tmp_path, QWEN_NAMES).load(max_tokens=10000)
    texts = [prompt_of(variant).template.format(caption) for variant, caption in zip(VARIANTS, CAPTIONS, strict=False)]
    assert [tokenize(text) for text in texts] == [real_tokenizer(text) for text in texts]
    assert tokenize.vocabulary == real_tokenizer.vocabulary == 151657


def test_text_is_the_pipelines(tiny_qwen):
    pipeline = opened("qwen-image", tiny_qwen("qwen-image"))
    long = "a cat and a dog " * 300
    texts = texts_of(tiny_qwen("qwen-image", "comfy"), *CAPTIONS, long)
    for caption, text in zip((*CAPTIONS, long), texts, strict=True):
        with torch.no_grad():
            expected, mask = pipeline.encode_prompt(caption)
        assert mask is None
        torch.testing.assert_close(text, expected[0], rtol=1e-5, atol=1e-5)
    assert len(texts[-1]) == 1024
    _, mask = pipeline.encode_prompt(list(CAPTIONS))
    assert mask.sum(1).tolist() == [len(text) for text in texts[:-1]]


def test_text_of_one_picture_is_the_pipelines(tiny_qwen, pictures):
    """The picture at the size that Edit shows to the text encoder: a megapixel."""
    pipeline = opened("qwen-image-edit", tiny_qwen("qwen-image-edit"))
    picture = picture_of(pictures[0])
    width, height = calculate_dimensions(VAE_IMAGE_SIZE, picture.width / picture.height)
    assert (width, height) == (1312, 800)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([CAPTIONS[0]], image=pipeline.image_processor.resize(picture, height, width))
    assert expected.shape[1] > 1300  # 1316 tokens of the picture
    [text] = texts_of(tiny_qwen("qwen-image-edit", "comfy"), CAPTIONS[0], controls=pictures[:1])
    torch.testing.assert_close(text, expected[0], rtol=1e-5, atol=1e-5)


def test_text_of_several_pictures_is_the_pipelines(real_model, pictures):
    """With the released tokenizer."""
    pipeline = opened("qwen-image-edit-plus", real_model)
    text_encoder = loaded(real_model)
    for number in (1, 3):
        shown = []
        for picture in map(picture_of, pictures[:number]):
            width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, picture.width / picture.height)
            shown.append(pipeline.image_processor.resize(picture, height, width))
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt([CAPTIONS[0]], image=shown)
        item = EncodeItem(key="a", caption=CAPTIONS[0], controls=tuple(pictures[:number]))
        torch.testing.assert_close(text_encoder.encode([item])[0]["text"], expected[0], rtol=1e-5, atol=1e-5)


def test_order_of_the_pictures_matters(tiny_qwen, pictures):
    folder = tiny_qwen("qwen-image-edit-plus")
    shown = [pictures[2], pictures[2].flip(-1)]
    first, second = (texts_of(folder, "a cat", controls=controls)[0] for controls in (shown, shown[::-1]))
    assert (first - second).abs().max() > 1e-2


def test_latents_are_the_pipelines(tiny_qwen, pictures):
    pipeline = opened("qwen-image-edit-plus", tiny_qwen("qwen-image-edit-plus"))
    pixels, control = pictures[1], pictures[1].flip(-1)
    with torch.no_grad():
        expected, other = (pipeline._encode_vae_image(each[None], generator=None)[0] for each in (pixels, control))
    folder = tiny_qwen("qwen-image-edit-plus", "comfy")
    latents = loaded(folder, "vae").encode([EncodeItem(key="a", pixels=pixels)])[0]["latents"]
    references = loaded(folder, "control_vae").encode([EncodeItem(key="a", controls=(control, pixels))])[0]["references"]
    assert latents.shape == (16, 1, 16, 12)
    assert references.shape == (2, 16, 1, 16, 12)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(references, torch.stack([other, expected]), rtol=1e-5, atol=1e-5)


def test_decode_undoes_the_scale(tiny_qwen, pictures):
    vae = loaded(tiny_qwen("qwen-image"), "vae")
    latents = vae.encode([EncodeItem(key="a", pixels=pictures[1])])[0]["latents"]
    with torch.no_grad():
        expected = vae.network.decode(vae.network.encode(pictures[1][None]).latent_dist.mode()).sample[0]
    torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["qwen-image", "qwen-image-edit-plus"])
def test_all_layouts_give_the_same_bits(tiny_qwen, pictures, variant):
    item = EncodeItem(key="a", caption=CAPTIONS[0], pixels=pictures[2], controls=(pictures[2],) * 2)
    results = []
    for layout in LAYOUTS:
        fields = {}
        for encoder in encoders_of(tiny_qwen(variant, layout)).values():
            encoder.load(CPU)
            fields |= encoder.encode([item])[0]
            encoder.unload()
        results.append(fields)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_text_does_not_depend_on_what_is_encoded_with_it(tiny_qwen):
    together = texts_of(tiny_qwen("qwen-image"), *CAPTIONS)
    assert all(
        torch.equal(text, texts_of(tiny_qwen("qwen-image"), caption)[0]) for caption, text in zip(CAPTIONS, together, strict=True)
    )


def test_low_precision_is_near_and_the_vae_stays_exact(tiny_qwen, pictures):
    folder = tiny_qwen("qwen-image-edit-plus")
    item = EncodeItem(key="a", pixels=pictures[2], controls=(pictures[2],))
    exact, half = (loaded(folder, "vae", dtype).encode([item])[0]["latents"] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact, half)
    [exact], [half] = (texts_of(folder, CAPTIONS[0], controls=pictures[2:], dtype=d) for d in (torch.float32, torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", ["control_vae", "text"])
def test_editing_needs_control_pictures(tiny_qwen, variant, name):
    with pytest.raises(UserError, match=r"cats/1.png has no control picture, .* set control_path"):
        loaded(tiny_qwen(variant), name).encode([EncodeItem(key="cats/1.png", caption="a cat")])


@pytest.mark.parametrize("name", ["control_vae", "text"])
def test_edit_takes_one_control_picture(tiny_qwen, pictures, name):
    item = EncodeItem(key="cats/1.png", caption="a cat", controls=(pictures[2],) * 2)
    with pytest.raises(UserError, match=r"has 2 control pictures, and qwen-image-edit takes one: .* qwen-image-edit-plus"):
        loaded(tiny_qwen("qwen-image-edit"), name).encode([item])


def test_the_models_own_image_processor_is_used(tiny_qwen, tmp_path, pictures):
    """Here one that is set to fewer pixels."""
    root = Path(shutil.copytree(tiny_qwen("qwen-image-edit"), tmp_path / "model"))
    usual = encoders_of(root)["text"].fingerprint()
    file = root / "processor/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 16}}))
    assert encoders_of(root)["text"].fingerprint() != usual
    [few], [many] = (texts_of(path, "a cat", controls=pictures[:1]) for path in (root, tiny_qwen("qwen-image-edit")))
    assert len(many) - len(few) > 1000


def test_fingerprint(tiny_qwen, tmp_path):
    """Another place gives the same one; other weights, dtype, variant or tokenizer another."""

    def prints(path, *arguments):
        return {name: encoder.fingerprint() for name, encoder in encoders_of(path, *arguments).items()}

    usual = prints(tiny_qwen("qwen-image-edit"))
    copy = Path(shutil.copytree(tiny_qwen("qwen-image-edit"), tmp_path / "elsewhere"))
    assert prints(copy) == usual
    half = prints(copy, torch.bfloat16)
    assert half["text"] != usual["text"]
    assert half["vae"] == usual["vae"]
    assert prints(tiny_qwen("qwen-image-edit-plus"))["text"] != usual["text"]
    tokenizer = copy / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("Ġcat", "Ġcow"))
    assert prints(copy)["text"] != usual["text"]


def test_tokenizer_of_another_model(tiny_qwen, tmp_path, assets):
    root = Path(shutil.copytree(tiny_qwen("qwen-image", "comfy"), tmp_path / "comfy"))
    place = root / "text_encoders/qwen2.5-vl/tokenizer.json"
    shutil.copy(assets.qwen_tokenizer / "tokenizer.json", place)
    with pytest.raises(UserError, match=r"has 151657 tokens, the text encoder knows \d+: they do not belong together"):
        loaded(root)
    made = (tiny_qwen("qwen-image") / "tokenizer/tokenizer.json").read_text()
    place.write_text(made.replace("<|image_pad|>", "<|picture|>"))
    with pytest.raises(UserError, match=r"is not Qwen2.5-VL's tokenizer: <\|image_pad\|> should be token"):
        loaded(root)


def test_unload_gives_the_network_back(tiny_qwen):
    for encoder in encoders_of(tiny_qwen("qwen-image-edit")).values():
        encoder.load(CPU)
        encoder.unload()
        with pytest.raises(AssertionError, match=r"used before load\(\)"):
            _ = encoder.network
