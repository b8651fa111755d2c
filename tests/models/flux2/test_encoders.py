"""The encoders against diffusers' pipelines, on real pictures and captions."""

import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from models import load_family
from models.flux2.chat import CHATS, ChatTokenizer
from models.flux2.tiny import QWEN3_CHAT
from tests.models.flux2.reference import PIPELINES
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Bucket
from utils.errors import UserError

BUCKET = Bucket(width=96, height=64, frames=1)
PICTURES = ("astronaut.png", "coffee.png", "chelsea.png")
CAPTIONS = (
    "a cat looks into the camera",
    "",
    "  [IMG] two\n\nlines, \u201cquotes\u201d & caf\u00e9 \u732b ",
    "a very long caption about coffee, " * 40,
)

QWEN3_MARKS = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN3_MARKS += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
"""Those that Qwen3 has and Qwen2 has not, in the order of their ids from 151657 on."""


def family_of(folder, **options):
    Family = load_family("flux2")
    return Family(Family.Options(type="flux2", path=folder, dtype="float32", **options))


def encoders_of(folder, **options):
    return {encoder.name: encoder for encoder in family_of(folder, **options).encoders()}


def encoded(encoder, *items):
    encoder.load(torch.device("cpu"))
    try:
        return encoder.encode(list(items))
    finally:
        encoder.unload()


@pytest.fixture(scope="module")
def pixels(assets):
    return [load_pixels(DataFile(assets.images[name]), BUCKET) for name in PICTURES]


def as_picture(pixels) -> Image.Image:
    return Image.fromarray(((pixels[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


def pipeline_of(folder, variant):
    return PIPELINES[variant].from_pretrained(folder, torch_dtype=torch.float32)


# --- pictures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "released", "comfy"])
def test_latents_and_references_are_those_of_the_diffusers_pipeline(flux2, variant, layout, pixels):
    pipeline = pipeline_of(flux2(variant), variant)
    for each in pixels:
        picture = pipeline.image_processor.preprocess(as_picture(each), resize_mode="crop")
        assert (picture - each[:, 0]).abs().max() <= 1e-6
    pictures = [each[:, 0][None] for each in pixels]
    with torch.no_grad():
        theirs = [pipeline._encode_vae_image(picture, generator=None)[0] for picture in pictures]
        packed, ids = pipeline.prepare_image_latents(pictures[1:], 1, None, "cpu", torch.float32)
    encoders = encoders_of(flux2(variant, layout))
    ours = encoded(encoders["vae"], *(EncodeItem(key="x", pixels=each) for each in pixels))
    for fields, expected in zip(ours, theirs, strict=True):
        assert fields["latents"].shape == (128, 1, 4, 6)
        assert (fields["latents"][:, 0] - expected).abs().max() <= 1e-6
    [fields] = encoded(encoders["references"], EncodeItem(key="x", controls=tuple(pixels[1:])))
    assert fields["references"].shape == (2, 128, 4, 6)
    tokens = fields["references"].flatten(2).transpose(1, 2).flatten(0, 1)
    assert (tokens - packed[0]).abs().max() <= 1e-6
    assert ids[0, ::24, 0].tolist() == [10, 20]


def test_an_item_without_control_pictures(flux2):
    [fields] = encoded(encoders_of(flux2("flux2-klein"))["references"], EncodeItem(key="x"))
    assert len(fields["references"]) == 0


def test_decoding_is_that_of_the_diffusers_pipeline(flux2, pixels):
    """Ours alone and theirs, from tokens to a picture, and both near the VAE's own round trip."""
    pipeline = pipeline_of(flux2("flux2-dev"), "flux2-dev")
    encoder = encoders_of(flux2("flux2-dev"))["vae"]
    encoder.load(torch.device("cpu"))
    [fields] = encoder.encode([EncodeItem(key="x", pixels=pixels[0])])
    ours = encoder.decode(fields["latents"])
    assert ours.shape == pixels[0].shape
    with torch.no_grad():
        vae = pipeline.vae
        direct = vae.decode(vae.encode(pixels[0][:, 0][None]).latent_dist.mode()).sample[0]
    assert (ours[:, 0] - direct).abs().max() <= 1e-4


def test_the_vae_is_always_fp32_and_its_identity_does_not_hang_on_dtype(flux2, pixels):
    Family = load_family("flux2")
    family = Family(Family.Options(type="flux2", path=flux2("flux2-dev"), dtype="bfloat16"))
    vae, references, text = family.encoders()
    [fields] = encoded(vae, EncodeItem(key="x", pixels=pixels[0]))
    [expected] = encoded(encoders_of(flux2("flux2-dev"))["vae"], EncodeItem(key="x", pixels=pixels[0]))
    assert torch.equal(fields["latents"], expected["latents"])
    exact = encoders_of(flux2("flux2-dev"))
    assert vae.fingerprint() == exact["vae"].fingerprint() != references.fingerprint()
    assert text.fingerprint() != exact["text"].fingerprint()
    assert encoded(text, EncodeItem(key="x", caption="a cat"))[0]["text"].dtype is torch.bfloat16


# --- captions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
def test_text_is_that_of_the_diffusers_pipeline(flux2, variant, layout):
    pipeline = pipeline_of(flux2(variant), variant)
    with torch.no_grad():
        theirs, ids = pipeline.encode_prompt(prompt=list(CAPTIONS))
    ours = encoded(encoders_of(flux2(variant, layout))["text"], *(EncodeItem(key="x", caption=caption) for caption in CAPTIONS))
    width = pipeline.transformer.config.joint_attention_dim
    for fields, expected in zip(ours, theirs, strict=True):
        assert fields["text"].shape == (512, width)
        assert (fields["text"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert ids[0, :, 3].tolist() == list(range(512))


def test_captions_in_the_real_vocabulary_of_qwen(flux2, assets, tmp_path):
    """Klein's tokenizer is that of Qwen2 with more marks and Qwen3's template."""
    folder = shutil.copytree(flux2("flux2-klein"), tmp_path / "klein")
    tokenizer = AutoTokenizer.from_pretrained(assets.qwen_tokenizer)
    tokenizer.add_tokens(QWEN3_MARKS)
    tokenizer.chat_template, tokenizer.padding_side, tokenizer.pad_token = QWEN3_CHAT, "right", "<|endoftext|>"
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(folder / "text_encoder", vocab_size=151936)
    Qwen3ForCausalLM(config).save_pretrained(folder / "text_encoder")

    pipeline = pipeline_of(folder, "flux2-klein")
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompt=list(CAPTIONS))
    ours = encoded(encoders_of(folder)["text"], *(EncodeItem(key="x", caption=caption) for caption in CAPTIONS))
    for fields, expected in zip(ours, theirs, strict=True):
        assert (fields["text"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokens = CHATS["qwen3"](ChatTokenizer(folder / "tokenizer").load(151936), "a cat")
    start, end, line = 151644, 151645, 198
    chat = [start, 872, line, 64, 8251, end, line, start, 77091, line, 151667, 271, 151668, 271]
    assert tokens.ids[0].tolist() == [*chat, *[151643] * (512 - len(chat))]


def test_padding_is_on_the_side_of_the_tokenizer(flux2):
    for variant, kind, side in (("flux2-dev", "mistral", 0), ("flux2-klein", "qwen3", -1)):
        tokenizer = ChatTokenizer(flux2(variant) / "tokenizer").load(1000)
        tokens = CHATS[kind](tokenizer, "a cat")
        assert tokens.ids.shape == tokens.mask.shape == (1, 512)
        assert tokens.mask[0, side] == 0
        assert tokens.ids[0, side] == tokenizer.pad_token_id


def test_chats_are_those_of_the_released_templates(flux2):
    """As the released tokenizers write them (and ComfyUI, which has them as text)."""
    dev = ChatTokenizer(flux2("flux2-dev") / "tokenizer").load(1000)
    tokens = CHATS["mistral"](dev, "a [IMG]cat")
    text = dev.decode(tokens.ids[0][tokens.mask[0].bool()])
    assert text == (
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]a cat[/INST]"
    )
    klein = ChatTokenizer(flux2("flux2-klein") / "tokenizer").load(1000)
    tokens = CHATS["qwen3"](klein, "a cat")
    text = klein.decode(tokens.ids[0][tokens.mask[0].bool()])
    assert text == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_what_the_tokenizer_is_changes_the_fingerprint(flux2, tmp_path):
    load_family("flux2").write_tiny("flux2-klein", tmp_path, "diffusers", seed=0)
    first = encoders_of(tmp_path)["text"].fingerprint()
    assert first == encoders_of(flux2("flux2-klein"))["text"].fingerprint()
    config = tmp_path / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text().replace('"right"', '"left"'))
    assert encoders_of(tmp_path)["text"].fingerprint() != first


def test_a_tokenizer_that_has_more_tokens_than_the_text_encoder(flux2):
    with pytest.raises(UserError, match="has 261 tokens, the text encoder knows 100"):
        ChatTokenizer(flux2("flux2-klein") / "tokenizer").load(100)


def test_the_tiny_tokenizers_are_read_as_real_ones_are(flux2, variant):
    """Any caption comes back, and the marks are single tokens."""
    tokenizer = AutoTokenizer.from_pretrained(flux2(variant) / "tokenizer")
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer(caption.replace("[IMG]", ""))["input_ids"]) == caption.replace("[IMG]", "")
    assert all(len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1 for mark in tokenizer.all_special_tokens)
