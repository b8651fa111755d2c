"""Tiny random FLUX.1 models in the layouts of the real releases, to try and to test everything without weights.

All layouts of one variant, seed and scale hold the same weights.  Every parameter is random (norms near 1), so that a part which is
read wrongly or left out shows in the output.  Heads and norms are of sizes for which, as for the
real ones, the files need no config.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from models.base import Layout
from models.common import clip
from models.common.kl_vae import kl_vae_key_map
from models.common.t5 import TIED
from models.common.text_encoders import CLIP_NAMES, find_tokenizer
from models.common.tiny import Part, prefixed, write_clip_tokenizer, write_json, write_t5_tokenizer
from models.flux.keys import flux_key_map
from models.flux.networks import LATENT_CHANNELS, VAE_SCALE, transformer_axes
from utils.weights.named import save_safetensors

PIPELINES = {"flux1-dev": "FluxPipeline", "flux1-schnell": "FluxPipeline", "flux1-kontext": "FluxKontextPipeline"}
VARIANTS = tuple(PIPELINES)
RELEASED_NAMES = {
    "flux1-dev": "flux1-dev.safetensors",
    "flux1-schnell": "flux1-schnell.safetensors",
    "flux1-kontext": "flux1-kontext-dev.safetensors",
}
COMFY_NAMES = RELEASED_NAMES | {"flux1-kontext": "flux1-dev-kontext.safetensors"}
HEADS, HEAD_DIM, BLOCKS = 2, 32, 3
CLIP_WIDTH, T5_WIDTH = 2 * clip.HEAD_DIM, 32
VOCABULARY_STEP = 128
"""T5's vocabulary is rounded up to a multiple of this, as the real one is."""
CLIP_FOLDERS = {"comfy": "text_encoders/clip-vit-large-patch14"}
T5_FOLDERS = {"comfy": "text_encoders/t5-v1_1-xxl"}


@dataclass(frozen=True)
class TinyModel:
    variant: str
    transformer: Part
    vae: Part
    clip: Part
    t5: Part


@dataclass(frozen=True)
class RealTokenizers:
    """Folders with real tokenizers to copy; the text encoders' vocabularies are made to fit."""

    clip: Path
    t5: Path


def write_tiny(
    variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1, tokenizers: RealTokenizers | None = None
) -> None:
    """Write a model below ``folder``; the same bytes for the same arguments.

    ``scale`` multiplies the width and the number of blocks of the transformer; the other networks stay tiny.
    """
    clip_folder, t5_folder = folder / CLIP_FOLDERS.get(layout, "tokenizer"), folder / T5_FOLDERS.get(layout, "tokenizer_2")
    for place in (clip_folder, t5_folder):
        place.mkdir(parents=True, exist_ok=True)
    if tokenizers:
        shutil.copytree(tokenizers.clip, clip_folder, dirs_exist_ok=True)
        shutil.copytree(tokenizers.t5, t5_folder, dirs_exist_ok=True)
    else:
        write_clip_tokenizer(clip_folder)
        write_t5_tokenizer(t5_folder)
    clip_vocabulary = find_tokenizer(clip_folder, CLIP_NAMES).load(max_tokens=2).vocabulary
    t5_vocabulary = find_tokenizer(t5_folder).load(max_tokens=1).vocabulary
    WRITERS[layout](folder, tiny_model(variant, clip_vocabulary, t5_vocabulary, seed, scale))


def tiny_model(variant: str, clip_vocabulary: int, t5_vocabulary: int, seed: int, scale: int) -> TinyModel:
    """The model's networks."""

    def transformer() -> nn.Module:
        return FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=BLOCKS * scale,
            num_single_layers=BLOCKS * scale,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS * scale,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=variant != "flux1-schnell",
            axes_dims_rope=transformer_axes(HEAD_DIM),
        )

    def vae() -> nn.Module:
        levels = 4
        return AutoencoderKL(
            block_out_channels=(32,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **VAE_SCALE,
        )

    def clip_text() -> nn.Module:
        sizes = {"hidden_size": CLIP_WIDTH, "intermediate_size": 2 * CLIP_WIDTH, "projection_dim": CLIP_WIDTH}
        heads = {"num_hidden_layers": 3, "num_attention_heads": CLIP_WIDTH // clip.HEAD_DIM}
        ends = {"bos_token_id": clip_vocabulary - 2, "eos_token_id": clip_vocabulary - 1, "pad_token_id": clip_vocabulary - 1}
        return CLIPTextModel(CLIPTextConfig(vocab_size=clip_vocabulary, **sizes, **heads, **ends))

    def t5() -> nn.Module:
        rounded = math.ceil(t5_vocabulary / VOCABULARY_STEP) * VOCABULARY_STEP
        sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return T5EncoderModel(T5Config(vocab_size=rounded, feed_forward_proj="gated-gelu", **sizes))

    return TinyModel(
        variant=variant,
        transformer=Part.made("transformer", transformer, seed),
        vae=Part.made("vae", vae, seed),
        clip=Part.made("text_encoder", clip_text, seed),
        t5=Part.made("text_encoder_2", t5, seed, tied=frozenset([TIED])),
    )


def _write_text_encoders(folder: Path, model: TinyModel) -> None:
    for name, part in {"text_encoder": model.clip, "text_encoder_2": model.t5}.items():
        part.module.config.save_pretrained(folder / name)
    # As older transformers wrote it, and as the released folders have it.
    save_safetensors(folder / "text_encoder/model.safetensors", prefixed("text_model.", model.clip.state), {"format": "pt"})
    save_safetensors(folder / "text_encoder_2/model.safetensors", model.t5.state, {"format": "pt"})


def _write_diffusers(folder: Path, model: TinyModel) -> None:
    index = {
        "_class_name": PIPELINES[model.variant],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    # Schnell's schedule is not shifted, the others' shift depends on the size.
    dynamic = {} if model.variant == "flux1-schnell" else {"use_dynamic_shifting": True, "shift": 3.0}
    FlowMatchEulerDiscreteScheduler(**dynamic).save_pretrained(folder / "scheduler")
    for name, part in {"transformer": model.transformer, "vae": model.vae}.items():
        part.module.save_config(folder / name)
        save_safetensors(folder / name / "diffusion_pytorch_model.safetensors", part.state, {"format": "pt"})
    _write_text_encoders(folder, model)


def _write_released(folder: Path, model: TinyModel) -> None:
    save_safetensors(folder / RELEASED_NAMES[model.variant], flux_key_map().to_released(model.transformer.state))
    save_safetensors(folder / "ae.safetensors", kl_vae_key_map().to_released(model.vae.state))
    _write_text_encoders(folder, model)


def _write_comfy(folder: Path, model: TinyModel) -> None:
    transformer = flux_key_map().to_released(model.transformer.state)
    save_safetensors(folder / "diffusion_models" / COMFY_NAMES[model.variant], transformer)
    save_safetensors(folder / "vae/ae.safetensors", kl_vae_key_map().to_released(model.vae.state))
    save_safetensors(folder / "text_encoders/clip_l.safetensors", prefixed("text_model.", model.clip.state))
    save_safetensors(folder / "text_encoders/t5xxl_fp16.safetensors", model.t5.state)


WRITERS: dict[Layout, Callable[[Path, TinyModel], None]] = {
    "diffusers": _write_diffusers,
    "released": _write_released,
    "comfy": _write_comfy,
}
