"""Tiny random Qwen-Image models in the layouts of the real releases, to try and to test everything without weights.

All layouts of one variant, seed and scale hold the same weights.  Every parameter is random (norms near 1), so that a part which is
read wrongly or left out shows in the output.  The release is a diffusers folder; "released" has its shards, and its tokenizer as
``vocab.json`` and ``merges.txt``.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from models.base import Layout
from models.common.text_encoders import MERGES, QWEN_NAMES, QWEN_SPECIAL_TOKENS, find_tokenizer
from models.common.tiny import Part, State, write_json, write_shards
from models.common.wan_vae import vae_key_map
from models.qwen_image.encoders import RELEASED_PROCESSOR
from models.qwen_image.files import EDIT, EDIT_2511, EDIT_PLUS, IMAGE, PIPELINES
from models.qwen_image.keys import EDIT_2511_MARK, qwen_key_map, text_key_map
from models.qwen_image.networks import build_text_encoder
from models.qwen_image.sizes import TEXT_CONSTANTS, TEXT_HEAD_DIM, VISION_CONSTANTS, VISION_HEAD_DIM
from utils.weights.named import save_safetensors

HEADS, HEAD_DIM, ROPE_AXES, BLOCKS = 2, 16, (4, 6, 6), 4
TEXT_HEADS, TEXT_KEY_HEADS, VISION_HEADS = 2, 1, 1
TEXT_WIDTH, VISION_WIDTH = TEXT_HEADS * TEXT_HEAD_DIM, VISION_HEADS * VISION_HEAD_DIM
COMFY_NAMES = {IMAGE: "qwen_image", EDIT: "qwen_image_edit", EDIT_PLUS: "qwen_image_edit_2509", EDIT_2511: "qwen_image_edit_2511"}
TOKENIZER_FOLDERS = {"diffusers": "tokenizer", "released": "tokenizer", "comfy": "text_encoders/qwen2.5-vl"}


@dataclass(frozen=True)
class TinyModel:
    variant: str
    transformer: Part
    vae: Part
    text_encoder: Part
    text_config: dict[str, Any]
    tokenizer: Path


def write_tiny(variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1, tokenizer: Path | None = None) -> None:
    """Write a model below ``folder``; the same bytes for the same arguments.

    ``scale`` multiplies the width and the number of blocks of the transformer; the other networks stay tiny.  ``tokenizer``: a
    folder with a real tokenizer to copy, instead of the one that is made; the text encoder's vocabulary is made to fit.
    """
    place = folder / TOKENIZER_FOLDERS[layout]
    place.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_qwen_tokenizer(place, whole=layout != "released")
    else:
        shutil.copytree(tokenizer, place, dirs_exist_ok=True)
    WRITERS[layout](folder, tiny_model(variant, place, seed, scale))


def write_qwen_tokenizer(folder: Path, whole: bool) -> None:
    """A small tokenizer in Qwen 2.5's form: every byte, a few words and its special tokens, so that any caption comes back.

    ``whole``: one ``tokenizer.json``; else ``vocab.json`` and ``merges.txt``.
    """
    words = ["Ġcat", "Ġdog", "Ġred", "the", "Ġthe", "ing", "Picture"]
    pairs = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    pairs = list(dict.fromkeys(pairs))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(map("".join, pairs))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    numbered = {str(len(tokens) + number): token for number, token in enumerate(QWEN_SPECIAL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {number: {"content": token, **flags} for number, token in numbered.items()}
    if whole:
        made = Qwen2Tokenizer(vocab=vocabulary, merges=pairs)
        made.add_tokens(list(QWEN_SPECIAL_TOKENS), special_tokens=True)
        made.backend_tokenizer.save(str(folder / "tokenizer.json"))
    else:
        write_json(folder / "vocab.json", vocabulary)
        (folder / MERGES).write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pairs), "utf-8")
        write_json(folder / "added_tokens.json", {token: int(number) for number, token in numbered.items()})
    about = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "added_tokens_decoder": decoder}
    write_json(folder / "tokenizer_config.json", {**about, **settings})


def tiny_model(variant: str, tokenizer: Path, seed: int, scale: int) -> TinyModel:
    """The model's networks.  ``tokenizer``: the folder it lies in."""
    tokenize = find_tokenizer(tokenizer, QWEN_NAMES).load(max_tokens=1)
    text_config = {
        "text_config": {
            **TEXT_CONSTANTS,
            "vocab_size": tokenize.vocabulary,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": TEXT_HEADS,
            "num_key_value_heads": TEXT_KEY_HEADS,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision_config": {
            **VISION_CONSTANTS,
            "fullatt_block_indexes": [1],
            "depth": 2,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 64,
            "num_heads": VISION_HEADS,
            "out_hidden_size": TEXT_WIDTH,
        },
        **{
            f"{name}_token_id": tokenize(token)[0]
            for name, token in {
                "image": "<|image_pad|>",
                "video": "<|video_pad|>",
                "vision_start": "<|vision_start|>",
                "vision_end": "<|vision_end|>",
            }.items()
        },
    }

    def transformer() -> nn.Module:
        return QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=BLOCKS * scale,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS * scale,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=ROPE_AXES,
            zero_cond_t=variant == EDIT_2511,
        )

    return TinyModel(
        variant=variant,
        transformer=Part.made("transformer", transformer, seed),
        vae=Part.made("vae", lambda: AutoencoderKLQwenImage(base_dim=4), seed),
        text_encoder=Part.made("text_encoder", lambda: build_text_encoder(text_config), seed),
        text_config=text_config,
        tokenizer=tokenizer,
    )


def _write_diffusers(folder: Path, model: TinyModel, shards: int = 1) -> None:
    pipelines = {variant: name for name, variant in PIPELINES.items()}
    index = {
        "_class_name": pipelines.get(model.variant, pipelines[EDIT_PLUS]),
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    if model.variant != IMAGE:
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        Qwen2VLImageProcessorPil(**RELEASED_PROCESSOR).save_pretrained(folder / "processor")
        for file in model.tokenizer.iterdir():
            shutil.copy(file, folder / "processor")
    write_json(folder / "model_index.json", dict(sorted(index.items())))
    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    ).save_pretrained(folder / "scheduler")
    for name, part in {"transformer": model.transformer, "vae": model.vae}.items():
        part.module.save_config(folder / name)
    write_shards(folder / "transformer/diffusion_pytorch_model.safetensors", model.transformer.state, shards)
    write_shards(folder / "vae/diffusion_pytorch_model.safetensors", model.vae.state, 1)
    config = Qwen2_5_VLConfig(**model.text_config, architectures=["Qwen2_5_VLForConditionalGeneration"])
    config.save_pretrained(folder / "text_encoder")
    write_shards(folder / "text_encoder/model.safetensors", _text_state(model), shards)


def _text_state(model: TinyModel) -> State:
    """With the head, as in real files, which is not used."""
    head = torch.zeros(model.text_config["text_config"]["vocab_size"], TEXT_WIDTH)
    return {**text_key_map().to_released(model.text_encoder.state), "lm_head.weight": head}


def _write_released(folder: Path, model: TinyModel) -> None:
    _write_diffusers(folder, model, shards=2)


def _write_comfy(folder: Path, model: TinyModel) -> None:
    stem = folder / f"diffusion_models/{COMFY_NAMES[model.variant]}_bf16"
    mark = {EDIT_2511_MARK: torch.zeros(0)} if model.variant == EDIT_2511 else {}
    save_safetensors(stem.with_suffix(".safetensors"), {**qwen_key_map().to_released(model.transformer.state), **mark})
    # Real files need no config: the axes of their position embedding are always the same.
    about = {"_class_name": "QwenImageTransformer2DModel", "axes_dims_rope": ROPE_AXES}
    write_json(stem.with_suffix(".json"), about)
    save_safetensors(folder / "vae/qwen_image_vae.safetensors", vae_key_map().to_released(model.vae.state))
    save_safetensors(folder / "text_encoders/qwen_2.5_vl_7b.safetensors", _text_state(model))
    # Nor here: the ids of the vision tokens are those of the real vocabulary, and block 1 is no special one.
    write_json(folder / "text_encoders/qwen_2.5_vl_7b.json", {"model_type": "qwen2_5_vl", **model.text_config})


WRITERS: dict[Layout, Callable[[Path, TinyModel], None]] = {
    "diffusers": _write_diffusers,
    "released": _write_released,
    "comfy": _write_comfy,
}
