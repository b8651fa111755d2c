"""Tiny random SD3 models in the layouts of the real releases, to try and to test everything without weights.

All layouts of one variant, seed and scale hold the same weights.  Every parameter is random (norms near 1), so that a part which is
read wrongly or left out shows in the output.  Of the transformer's heads, single files do not tell the width: a config lies beside.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from models.base import Layout
from models.common import clip
from models.common.kl_vae import kl_vae_key_map
from models.common.t5 import TIED
from models.common.text_encoders import CLIP_NAMES, find_tokenizer
from models.common.tiny import CLIP_ENDS, Part, State, prefixed, write_clip_tokenizer, write_json, write_t5_tokenizer
from models.sd3.keys import sd3_key_map
from models.sd3.sizes import LATENT_SCALE
from utils.weights.named import save_safetensors

VARIANTS = ("sd3-medium", "sd35-large", "sd35-medium")
STEMS = {"sd3-medium": "sd3_medium", "sd35-large": "sd3.5_large", "sd35-medium": "sd3.5_medium"}
"""Names of the releases' files."""
HEADS, HEAD_DIM, BLOCKS, DUAL_BLOCKS = 2, 16, 4, 2
CHANNELS, PATCH, POSITIONS = 16, 2, 24
CLIP_L_WIDTH, CLIP_G_WIDTH = 3 * clip.HEAD_DIM, 5 * clip.HEAD_DIM
T5_WIDTH = CLIP_L_WIDTH + CLIP_G_WIDTH
"""As in the real model no less than the two CLIPs side by side."""
VOCABULARY_STEP = 128
"""T5's vocabulary is rounded up to a multiple of this, as the real one is."""
CLIP_FOLDERS = {
    "diffusers": ("tokenizer", "tokenizer_2"),
    "released": ("tokenizer",),
    "comfy": ("text_encoders/clip-vit-large-patch14",),
}
T5_FOLDERS = {"diffusers": "tokenizer_3", "released": "tokenizer_3", "comfy": "text_encoders/t5-v1_1-xxl"}
PADS = {"tokenizer_2": "!"}


@dataclass(frozen=True)
class TinyModel:
    variant: str
    transformer: Part
    vae: Part
    clip_l: Part
    clip_g: Part
    t5: Part

    def released(self) -> State:
        return sd3_key_map(self.transformer.module.config.num_layers).to_released(self.transformer.state)

    def clip_l_released(self) -> State:
        """Without the projection, which is the identity."""
        return {name: tensor for name, tensor in self.clip_l.state.items() if name != "text_projection.weight"}


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
    clip_folders, t5_folder = [folder / name for name in CLIP_FOLDERS[layout]], folder / T5_FOLDERS[layout]
    for place in (*clip_folders, t5_folder):
        place.mkdir(parents=True, exist_ok=True)
    for place in clip_folders:
        write_clip_tokenizer(place, PADS.get(place.name, CLIP_ENDS[1]))
        if tokenizers:
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(tokenizers.clip / name, place / name)
    if tokenizers:
        shutil.copytree(tokenizers.t5, t5_folder, dirs_exist_ok=True)
    else:
        write_t5_tokenizer(t5_folder)
    clip_vocabulary = find_tokenizer(clip_folders[0], CLIP_NAMES).load(max_tokens=2).vocabulary
    t5_vocabulary = find_tokenizer(t5_folder).load(max_tokens=1).vocabulary
    WRITERS[layout](folder, tiny_model(variant, clip_vocabulary, t5_vocabulary, seed, scale))


def tiny_model(variant: str, clip_vocabulary: int, t5_vocabulary: int, seed: int, scale: int) -> TinyModel:
    """The model's networks."""

    def transformer() -> nn.Module:
        width = HEADS * HEAD_DIM * scale
        return SD3Transformer2DModel(
            patch_size=PATCH,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=BLOCKS * scale,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS * scale,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
            pos_embed_max_size=POSITIONS,
            dual_attention_layers=tuple(range(DUAL_BLOCKS * scale)) if variant == "sd35-medium" else (),
            qk_norm=None if variant == "sd3-medium" else "rms_norm",
        )

    def vae() -> nn.Module:
        levels = 4
        return AutoencoderKL(
            block_out_channels=(32,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=CHANNELS,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **LATENT_SCALE,
        )

    def clip_text(width: int, activation: str) -> Callable[[], nn.Module]:
        ends = {"bos_token_id": clip_vocabulary - 2, "eos_token_id": clip_vocabulary - 1, "pad_token_id": clip_vocabulary - 1}
        sizes = {"hidden_size": width, "intermediate_size": clip.HEAD_DIM, "projection_dim": width, "num_hidden_layers": 3}
        heads = {"num_attention_heads": width // clip.HEAD_DIM, "hidden_act": activation}
        return lambda: CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=clip_vocabulary, **sizes, **heads, **ends))

    def t5() -> nn.Module:
        rounded = math.ceil(t5_vocabulary / VOCABULARY_STEP) * VOCABULARY_STEP
        sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return T5EncoderModel(T5Config(vocab_size=rounded, feed_forward_proj="gated-gelu", **sizes))

    clip_l = Part.made("text_encoder", clip_text(CLIP_L_WIDTH, "quick_gelu"), seed)
    clip_l.state["text_projection.weight"] = torch.eye(CLIP_L_WIDTH)  # as in the release
    return TinyModel(
        variant=variant,
        transformer=Part.made("transformer", transformer, seed),
        vae=Part.made("vae", vae, seed),
        clip_l=clip_l,
        clip_g=Part.made("text_encoder_2", clip_text(CLIP_G_WIDTH, "gelu"), seed),
        t5=Part.made("text_encoder_3", t5, seed, tied=frozenset([TIED])),
    )


def _write_diffusers(folder: Path, model: TinyModel) -> None:
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    for name, part in {"transformer": model.transformer, "vae": model.vae}.items():
        part.module.save_config(folder / name)
        save_safetensors(folder / name / "diffusion_pytorch_model.safetensors", part.state, {"format": "pt"})
    for name, part in {"text_encoder": model.clip_l, "text_encoder_2": model.clip_g, "text_encoder_3": model.t5}.items():
        part.module.config.save_pretrained(folder / name)
        save_safetensors(folder / name / "model.safetensors", part.state, {"format": "pt"})


def _write_checkpoint(path: Path, model: TinyModel, prefix: str, *others: State) -> None:
    """A file with the transformer and ``others``, and the transformer's config beside it."""
    state = prefixed(prefix, model.released())
    for other in others:
        state |= other
    save_safetensors(path, state)
    model.transformer.module.save_config(path.parent)
    (path.parent / "config.json").rename(path.with_suffix(".json"))


def _write_text_encoders(folder: Path, model: TinyModel) -> None:
    save_safetensors(folder / "clip_l.safetensors", model.clip_l_released())
    save_safetensors(folder / "clip_g.safetensors", model.clip_g.state)
    save_safetensors(folder / "t5xxl_fp16.safetensors", model.t5.state)


def _write_released(folder: Path, model: TinyModel) -> None:
    """SD3 Medium as the checkpoint that holds everything, SD3.5 as the one with transformer and VAE, and the text encoders."""
    vae = prefixed("first_stage_model.", kl_vae_key_map().to_released(model.vae.state))
    stem = STEMS[model.variant]
    if model.variant == "sd3-medium":
        texts = {"clip_l": model.clip_l_released(), "clip_g": model.clip_g.state, "t5xxl": model.t5.state}
        inside = [prefixed(f"text_encoders.{name}.transformer.", state) for name, state in texts.items()]
        path = folder / f"{stem}_incl_clips_t5xxlfp16.safetensors"
        _write_checkpoint(path, model, "model.diffusion_model.", vae, *inside)
    else:
        _write_checkpoint(folder / f"{stem}.safetensors", model, "model.diffusion_model.", vae)
        _write_text_encoders(folder / "text_encoders", model)


def _write_comfy(folder: Path, model: TinyModel) -> None:
    _write_checkpoint(folder / f"diffusion_models/{STEMS[model.variant]}.safetensors", model, "")
    save_safetensors(folder / "vae/sd3_vae.safetensors", kl_vae_key_map().to_released(model.vae.state))
    _write_text_encoders(folder / "text_encoders", model)


WRITERS: dict[Layout, Callable[[Path, TinyModel], None]] = {
    "diffusers": _write_diffusers,
    "released": _write_released,
    "comfy": _write_comfy,
}
