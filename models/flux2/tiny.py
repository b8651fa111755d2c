"""Tiny random FLUX.2 models in the layouts of the real releases, to try and to test everything without weights.

All layouts of one variant, seed and scale hold the same weights.  Every parameter is random (norms near 1), so that a part which is
read wrongly or left out shows in the output.  The text encoders are as deep as the real ones must be for the states that are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from models.base import Layout
from models.common.tiny import Part, State, write_json
from models.flux2.encoder_keys import BATCH_COUNT, vae_key_map
from models.flux2.keys import flux2_key_map
from utils.weights.named import save_safetensors

HEADS, HEAD_DIM, DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 16, 3, 3
VOCABULARY = 320
"""Of the text encoders; the tokenizers have 256 bytes and some marks."""
OLD_MISTRAL_NAMES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
"""What transformers and the released folders write before the names of a Mistral 3 model."""

QWEN3_CHAT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL_CHAT = """\
{%- macro text_of(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- part['text'] if part['type'] == 'text' else '[IMG]' }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + text_of(message['content']) + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + text_of(message['content']) + '[/INST]' }}
    {%- else %}
        {{- text_of(message['content']) + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""Both make of a caption what the released templates make of it."""


def _mistral() -> nn.Module:
    text = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 31, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", **text, **heads},
            vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, **vision},
        )
    )


def _qwen3() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 28, "head_dim": 8}
    return Qwen3ForCausalLM(
        Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6, tie_word_embeddings=True)
    )


@dataclass(frozen=True)
class Kind:
    """What is different between the variants."""

    file: str
    """Name of the released transformer's file, without ending."""
    text_file: str
    """The same of ComfyUI's text encoder."""
    pipeline: str
    text_encoder: Callable[[], nn.Module]
    text_width: int
    """Three hidden states side by side."""
    special_tokens: tuple[str, ...]
    tokenizer: Mapping[str, str]
    """``tokenizer_config.json``."""


KINDS = {
    "flux2-dev": Kind(
        file="flux2-dev",
        text_file="mistral_3_small_flux2_bf16",
        pipeline="Flux2Pipeline",
        text_encoder=_mistral,
        text_width=48,
        special_tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<pad>"),
        tokenizer={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "padding_side": "left",
            "chat_template": MISTRAL_CHAT,
        },
    ),
    "flux2-klein": Kind(
        file="flux-2-klein-4b",
        text_file="qwen_3_4b",
        pipeline="Flux2KleinPipeline",
        text_encoder=_qwen3,
        text_width=24,
        special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        tokenizer={
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "chat_template": QWEN3_CHAT,
        },
    ),
}
VARIANTS = tuple(KINDS)


@dataclass(frozen=True)
class TinyModel:
    kind: Kind
    transformer: Part
    vae: Part
    text_encoder: Part


def write_tiny(variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
    """Write a model below ``folder``; the same bytes for the same arguments.

    ``scale`` multiplies the width and the number of blocks of the transformer; the other networks stay tiny.
    """
    kind = KINDS[variant]
    write_tokenizer(folder / "tokenizer", kind)
    WRITERS[layout](folder, tiny_model(kind, seed, scale))


def write_tokenizer(folder: Path, kind: Kind) -> None:
    """A tokenizer of single bytes and the release's marks, with its way of padding and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*kind.special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in kind.special_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**config, **kind.tokenizer})


def tiny_model(kind: Kind, seed: int, scale: int) -> TinyModel:
    """The model's networks."""

    def transformer() -> nn.Module:
        return Flux2Transformer2DModel(
            num_layers=DOUBLE_BLOCKS * scale,
            num_single_layers=SINGLE_BLOCKS * scale,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS * scale,
            joint_attention_dim=kind.text_width,
            timestep_guidance_channels=32,
            axes_dims_rope=(HEAD_DIM // 4,) * 4,
            guidance_embeds=kind.pipeline == "Flux2Pipeline",
        )

    def vae() -> nn.Module:
        return AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=64)

    part = Part.made("vae", vae, seed)
    statistics = {"bn.running_var": 0.5 + part.state["bn.running_var"].abs(), BATCH_COUNT: torch.tensor(1000)}
    return TinyModel(
        kind=kind,
        transformer=Part.made("transformer", transformer, seed),
        vae=Part(part.module, part.state | statistics),
        text_encoder=Part.made("text_encoder", kind.text_encoder, seed, tied=frozenset(["lm_head.weight"])),
    )


def _write_text_encoder(folder: Path, model: TinyModel) -> None:
    """A folder as transformers writes it."""
    model.text_encoder.module.config.save_pretrained(folder)
    state = model.text_encoder.state
    if model.kind.text_encoder is _mistral:
        state = {_renamed(name, OLD_MISTRAL_NAMES): tensor for name, tensor in state.items()}
    save_safetensors(folder / "model.safetensors", state, {"format": "pt"})


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    old = next(beginning for beginning in beginnings if name.startswith(beginning))
    return beginnings[old] + name.removeprefix(old)


def _write_diffusers(folder: Path, model: TinyModel) -> None:
    index = {
        "_class_name": model.kind.pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", type(model.text_encoder.module).__name__],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    write_json(folder / "model_index.json", index)
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    for name, part in {"transformer": model.transformer, "vae": model.vae}.items():
        part.module.save_config(folder / name)
        save_safetensors(folder / name / "diffusion_pytorch_model.safetensors", part.state, {"format": "pt"})
    _write_text_encoder(folder / "text_encoder", model)


def _write_vae(file: Path, model: TinyModel) -> None:
    save_safetensors(file, vae_key_map().to_released(model.vae.state) | {BATCH_COUNT: model.vae.state[BATCH_COUNT]})
    # Real files need no config: the groups of their norms are all 32.
    write_json(file.with_suffix(".json"), {"_class_name": "AutoencoderKLFlux2", "norm_num_groups": 4})


def _write_released(folder: Path, model: TinyModel) -> None:
    save_safetensors(folder / f"{model.kind.file}.safetensors", flux2_key_map().to_released(model.transformer.state))
    _write_vae(folder / "ae.safetensors", model)
    _write_text_encoder(folder / "text_encoder", model)


def _write_comfy(folder: Path, model: TinyModel) -> None:
    transformer = flux2_key_map().to_released(model.transformer.state)
    save_safetensors(folder / f"diffusion_models/{model.kind.file}.safetensors", transformer)
    _write_vae(folder / "vae/flux2-vae.safetensors", model)
    text: State = {_renamed(name, COMFY_TEXT): tensor for name, tensor in model.text_encoder.state.items()}
    save_safetensors(folder / f"text_encoders/{model.kind.text_file}.safetensors", text)
    # Real files need no config: there is one of each size.
    config: dict[str, Any] = model.text_encoder.module.config.to_dict()
    write_json(folder / f"text_encoders/{model.kind.text_file}.json", config)


COMFY_TEXT = {"model.language_model.": "model.", "model.vision_tower.": "vision_tower.", "model.multi": "multi", "": ""}
"""ComfyUI's names of the text encoders: those of the language model alone, the others beside it."""
WRITERS: dict[Layout, Callable[[Path, TinyModel], None]] = {
    "diffusers": _write_diffusers,
    "released": _write_released,
    "comfy": _write_comfy,
}
