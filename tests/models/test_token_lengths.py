"""How long captions are for each family's text encoders, against transformers' own tokenizers called by hand."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from transformers import AutoTokenizer

from models import load_family
from models.common.text_encoders import clean_caption
from models.flux.tiny import RealTokenizers as FluxTokenizers
from models.flux.tiny import write_tiny as write_flux
from models.flux2.chat import ChatTokenizer
from models.flux2.tiny import QWEN3_CHAT
from models.qwen_image.tiny import write_tiny as write_qwen
from models.sd3.tiny import RealTokenizers as Sd3Tokenizers
from models.sd3.tiny import write_tiny as write_sd3
from models.sdxl.tiny import write_tiny as write_sdxl
from models.wan.tiny import write_tiny as write_wan
from utils.data.encoders import ConditionEncoder
from utils.errors import UserError

CAPTIONS = (
    "a cat looks into the camera",
    "",
    "  two\n\nlines, “quotes” &amp; café 猫 自行车 🚲 ",
    "a very long caption about coffee, " * 40,
    "many a small cup of coffee, " * 300,
)


def encoders_of(name: str, folder: Path, **options) -> dict[str, ConditionEncoder]:
    """Of a model whose weights are gone once it is opened: captions are counted without them."""
    Family = load_family(name)
    found = {encoder.name: encoder for encoder in Family(Family.Options(type=name, path=folder, **options)).encoders()}
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return found


def counted(encoder: ConditionEncoder, controls: int = 0) -> list[tuple[int, int, bool]]:
    return [(length.tokens, length.limit, length.is_cut) for length in encoder.token_lengths(CAPTIONS, controls)]


def by_hand(tokenizer: Path, limit: int, text: Callable[[str], str] = lambda caption: caption) -> list[tuple[int, int, bool]]:
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    whole = [theirs(text(caption)).input_ids for caption in CAPTIONS]
    read = [theirs(text(caption), truncation=True, max_length=limit).input_ids for caption in CAPTIONS]
    return [(len(ids), limit, len(ids) != len(cut)) for ids, cut in zip(whole, read, strict=True)]


def test_wan(assets, tmp_path):
    write_wan("wan-t2v", tmp_path, "diffusers", seed=0, tokenizer=assets.umt5_tokenizer)
    encoders = encoders_of("wan", tmp_path)
    expected = by_hand(assets.umt5_tokenizer, 512, clean_caption)
    assert counted(encoders["text"]) == expected
    assert [cut for _, _, cut in expected] == [False, False, False, False, True]
    assert encoders["vae"].token_lengths(CAPTIONS) == []


def test_flux(assets, tmp_path):
    tokenizers = FluxTokenizers(assets.clip_tokenizer, assets.t5_tokenizer)
    for variant, limit in (("flux1-schnell", 256), ("flux1-dev", 512)):
        write_flux(variant, tmp_path / variant, "diffusers", seed=0, tokenizers=tokenizers)
        encoders = encoders_of("flux", tmp_path / variant)
        assert counted(encoders["clip"]) == by_hand(assets.clip_tokenizer, 77)
        assert counted(encoders["t5"]) == by_hand(assets.t5_tokenizer, limit)


def test_sd3(assets, tmp_path):
    tokenizers = Sd3Tokenizers(assets.clip_tokenizer, assets.t5_tokenizer)
    write_sd3("sd3-medium", tmp_path, "diffusers", seed=0, tokenizers=tokenizers)
    encoders = encoders_of("sd3", tmp_path, t5_max_tokens=154)
    for name in ("clip_l", "clip_g"):
        assert counted(encoders[name]) == by_hand(assets.clip_tokenizer, 77)
    assert counted(encoders["t5"]) == by_hand(assets.t5_tokenizer, 154)


@pytest.mark.parametrize("trained", [False, True])
def test_sdxl_reads_several_chunks(assets, tmp_path, trained):
    """Each with a start and an end of its own, so that three chunks hold as much as 3 x 75 + 2 tokens in one row."""
    write_sdxl("sdxl", tmp_path, "diffusers", seed=0, tokenizer=assets.clip_tokenizer)
    rates = {"text_encoder_1_lr": 1e-5, "text_encoder_2_lr": 1e-5} if trained else {}
    encoders = encoders_of("sdxl", tmp_path, max_prompt_chunks=3, **rates)
    for name in ["clip_tokens"] if trained else ["clip_l", "clip_g"]:
        assert counted(encoders[name]) == by_hand(assets.clip_tokenizer, 3 * 75 + 2)


def test_qwen_with_its_template(assets, tmp_path):
    write_qwen("qwen-image", tmp_path, "diffusers", seed=0, tokenizer=assets.qwen_tokenizer)
    pipeline = QwenImagePipeline(**dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "transformer"]))
    expected = by_hand(assets.qwen_tokenizer, 1024 + 34, pipeline.prompt_template_encode.format)
    assert counted(encoders_of("qwen_image", tmp_path)["text"]) == expected
    assert expected[1][0] > 34  # the template alone


def test_qwen_announces_each_control_picture(assets, tmp_path):
    write_qwen("qwen-image-edit-plus", tmp_path, "diffusers", seed=0, tokenizer=assets.qwen_tokenizer)
    parts = ["scheduler", "vae", "text_encoder", "tokenizer", "transformer", "processor"]
    template = QwenImageEditPlusPipeline(**dict.fromkeys(parts)).prompt_template_encode
    text = encoders_of("qwen_image", tmp_path)["text"]
    for controls in (1, 2):
        shown = "".join(f"Picture {n + 1}: <|vision_start|><|image_pad|><|vision_end|>" for n in range(controls))
        expected = by_hand(assets.qwen_tokenizer, 1024 + 64, lambda caption, shown=shown: template.format(shown + caption))
        assert counted(text, controls) == expected


def test_flux2_klein_with_its_chat(assets, tmp_path):
    load_family("flux2").write_tiny("flux2-klein", tmp_path, "diffusers", seed=0)
    text = encoders_of("flux2", tmp_path)["text"]
    tokenizer = AutoTokenizer.from_pretrained(assets.qwen_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template, tokenizer.padding_side, tokenizer.pad_token = QWEN3_CHAT, "right", "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "real")
    text.tokenizer, text.config = ChatTokenizer(tmp_path / "real"), {**text.config, "vocab_size": 151936}
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert counted(text) == by_hand(tmp_path / "real", 512, chat.format)


def test_flux2_dev_with_its_system_message(tmp_path):
    # Mistral's own tokenizer is in no package: this is the made one in its form, with the release's template.
    load_family("flux2").write_tiny("flux2-dev", tmp_path, "diffusers", seed=0)
    text = encoders_of("flux2", tmp_path)["text"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    chat = (
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]{}[/INST]"
    )
    expected = [len(tokenizer(chat.format(caption), add_special_tokens=False).input_ids) for caption in CAPTIONS]
    assert counted(text) == [(length, 512, length > 512) for length in expected]
    assert not text.token_lengths(["a cat"])[0].is_cut


def test_sentencepiece_counts_the_same(assets, tmp_path):
    pytest.importorskip("sentencepiece")
    shutil.copytree(assets.t5_tokenizer, tmp_path / "spiece", ignore=shutil.ignore_patterns("tokenizer.json"))
    tokenizers = FluxTokenizers(assets.clip_tokenizer, tmp_path / "spiece")
    write_flux("flux1-dev", tmp_path / "model", "diffusers", seed=0, tokenizers=tokenizers)
    captions = [caption for caption in CAPTIONS if "🚲" not in caption]  # which the two spell differently
    lengths = [length.tokens for length in encoders_of("flux", tmp_path / "model")["t5"].token_lengths(captions)]
    theirs = AutoTokenizer.from_pretrained(assets.t5_tokenizer)
    assert lengths == [len(theirs(caption).input_ids) for caption in captions]


def test_a_tokenizer_of_another_model_is_refused_here_too(assets, tmp_path):
    load_family("wan").write_tiny("wan-t2v", tmp_path, "diffusers", seed=0)
    shutil.copy(assets.umt5_tokenizer / "tokenizer.json", tmp_path / "tokenizer/tokenizer.json")
    text = encoders_of("wan", tmp_path)["text"]
    with pytest.raises(UserError, match="do not belong together"):
        text.token_lengths(["a cat"])
