"""Tiny random Wan models in the layouts of the real releases, to try and to test everything without weights.

All layouts of one variant, seed and scale hold the same weights.  Every parameter is random (norms near 1), so that a part which is
read wrongly or left out shows in the output.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.base import Layout
from models.common.text_encoders import SPIECE_TENSOR, find_tokenizer
from models.common.tiny import Part, prefixed, write_json, write_shards, write_t5_tokenizer
from models.wan.encoder_keys import clip_key_map, t5_key_map, vae_22_key_map, vae_key_map
from models.wan.keys import wan_key_map
from models.wan.networks import TIED
from models.wan.sizes import CLIP_HEAD_DIM, VAE_22_LATENTS
from models.wan.variants import VARIANTS, Expert, Variant
from utils.weights.keymap import KeyMap
from utils.weights.named import save_safetensors

HEADS, HEAD_DIM, BLOCKS = 2, 12, 4
TEXT_WIDTH, CLIP_WIDTH = 32, 2 * CLIP_HEAD_DIM
CLIP_TOKENS = 257
"""Of one picture: 16 x 16 patches and the class."""
VAE_BASE = 4
VAE_22_SHAPE = {
    "is_residual": True,
    "decoder_base_dim": VAE_BASE,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    **VAE_22_LATENTS,
}
VOCABULARY_STEP = 128
"""The text encoder's vocabulary is rounded up to a multiple of this, as UMT5's is."""
EXPERT_FOLDERS: dict[Layout, dict[Expert, str]] = {
    "diffusers": {"high": "transformer", "low": "transformer_2"},
    "released": {"high": "high_noise_model", "low": "low_noise_model"},
}
TOKENIZER_FOLDERS = {"diffusers": "tokenizer", "released": "google/umt5-xxl", "comfy": "text_encoders/umt5-xxl"}


@dataclass(frozen=True)
class VaeRelease:
    """How a version of the VAE is released."""

    file: str
    comfy_file: str
    key_map: Callable[[], KeyMap]
    shape: dict[str, Any]


VAES = {
    16: VaeRelease("Wan2.1_VAE.pth", "wan_2.1_vae.safetensors", vae_key_map, {}),
    48: VaeRelease("Wan2.2_VAE.pth", "wan2.2_vae.safetensors", vae_22_key_map, VAE_22_SHAPE),
}
"""By the number of latent channels."""


@dataclass(frozen=True)
class TinyModel:
    variant: str
    transformer: Part
    transformer_2: Part | None
    """The low-noise expert of Wan 2.2 A14B; ``transformer`` is the other."""
    vae: Part
    text_encoder: Part
    image_encoder: Part | None
    tokenizer: Path

    @property
    def facts(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def vae_release(self) -> VaeRelease:
        return VAES[self.facts.latent_channels]

    @property
    def experts(self) -> dict[Expert, Part]:
        """Both transformers of Wan 2.2 A14B; none of the other models."""
        return {"high": self.transformer, "low": self.transformer_2} if self.transformer_2 else {}


def write_tiny(variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1, tokenizer: Path | None = None) -> None:
    """Write a model below ``folder``; the same bytes for the same arguments.

    ``scale`` multiplies the width and the number of blocks of the transformer; the other networks stay tiny.  ``tokenizer``: a
    folder with a real tokenizer to copy, instead of the one that is made; the text encoder's vocabulary is made to fit.
    """
    place = folder / TOKENIZER_FOLDERS[layout]
    place.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_t5_tokenizer(place)
    else:
        shutil.copytree(tokenizer, place, dirs_exist_ok=True)
    WRITERS[layout](folder, tiny_model(variant, place, seed, scale))


def tiny_model(variant: str, tokenizer: Path, seed: int, scale: int) -> TinyModel:
    """The model's networks.  ``tokenizer``: the folder it lies in."""
    facts = VARIANTS[variant]
    width = HEADS * HEAD_DIM * scale
    vocabulary = find_tokenizer(tokenizer).load(max_tokens=1).vocabulary

    def part(name: str, build: Callable[[], nn.Module]) -> Part:
        return Part.made(name, build, seed, tied=frozenset([TIED]))

    def transformer() -> nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=HEADS * scale,
            attention_head_dim=HEAD_DIM,
            in_channels=facts.in_channels,
            out_channels=facts.latent_channels,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=2 * width,
            num_layers=BLOCKS * scale,
            image_dim=CLIP_WIDTH if facts.with_clip else None,
            added_kv_proj_dim=width if facts.with_clip else None,
            pos_embed_seq_len=2 * CLIP_TOKENS if facts.with_clip and facts.condition == "first and last" else None,
        )

    def vae() -> nn.Module:
        return AutoencoderKLWan(base_dim=VAE_BASE, z_dim=facts.latent_channels, **VAES[facts.latent_channels].shape)

    def text_encoder() -> nn.Module:
        rounded = math.ceil(vocabulary / VOCABULARY_STEP) * VOCABULARY_STEP
        return UMT5EncoderModel(UMT5Config(vocab_size=rounded, d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4))

    def image_encoder() -> nn.Module:
        heads = CLIP_WIDTH // CLIP_HEAD_DIM
        sizes = {"hidden_size": CLIP_WIDTH, "intermediate_size": 2 * CLIP_WIDTH, "num_attention_heads": heads}
        return CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=224, patch_size=14, hidden_act="gelu"))

    return TinyModel(
        variant=variant,
        transformer=part("transformer", transformer),
        transformer_2=part("transformer_2", transformer) if facts.boundary else None,
        vae=part("vae", vae),
        text_encoder=part("text_encoder", text_encoder),
        image_encoder=part("image_encoder", image_encoder) if facts.with_clip else None,
        tokenizer=tokenizer,
    )


def _write_diffusers(folder: Path, model: TinyModel) -> None:
    index = {
        "_class_name": "WanImageToVideoPipeline" if model.facts.condition else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if model.facts.release == "wan2.2":
        index |= {
            "boundary_ratio": model.facts.boundary,
            "expand_timesteps": model.facts.boundary is None,
            "transformer_2": index["transformer"] if model.transformer_2 else [None, None],
        }
    if model.image_encoder:
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessorPil"],
        }
        CLIPImageProcessorPil().save_pretrained(folder / "image_processor")
        model.image_encoder.module.config.save_pretrained(folder / "image_encoder")
        # As older transformers wrote it, and as the released folders have it.
        save_safetensors(folder / "image_encoder/model.safetensors", prefixed("vision_model.", model.image_encoder.state))
    write_json(folder / "model_index.json", index)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    transformers = {EXPERT_FOLDERS["diffusers"][expert]: part for expert, part in model.experts.items()}
    for name, part in {"transformer": model.transformer, **transformers, "vae": model.vae}.items():
        part.module.save_config(folder / name)
        save_safetensors(folder / name / "diffusion_pytorch_model.safetensors", part.state, {"format": "pt"})
    model.text_encoder.module.config.save_pretrained(folder / "text_encoder")
    save_safetensors(folder / "text_encoder/model.safetensors", model.text_encoder.state, {"format": "pt"})


def _released_config(model: TinyModel) -> dict[str, Any]:
    config = model.transformer.module.config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": model.facts.kind,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": 512,
    }


def _write_released(folder: Path, model: TinyModel) -> None:
    transformers = {folder / EXPERT_FOLDERS["released"][expert]: part for expert, part in model.experts.items()}
    for place, part in (transformers or {folder: model.transformer}).items():
        write_json(place / "config.json", _released_config(model))
        released = wan_key_map().to_released(part.state)
        if model.variant == "wan-t2v":  # as the 1.3B model is released
            save_safetensors(place / "diffusion_pytorch_model.safetensors", released)
        else:  # as the larger models are
            write_shards(place / "diffusion_pytorch_model.safetensors", released, count=2)
    if model.image_encoder:
        clip = prefixed("visual.", clip_key_map().to_released(model.image_encoder.state))
        # The release holds the whole CLIP; these stand for what is not used of it.
        clip |= {"visual.head": torch.zeros(CLIP_WIDTH, 8), "textual.norm.weight": torch.zeros(8), "log_scale": torch.zeros(())}
        torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    torch.save(t5_key_map().to_released(model.text_encoder.state), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(model.vae_release.key_map().to_released(model.vae.state), folder / model.vae_release.file)


def _write_comfy(folder: Path, model: TinyModel) -> None:
    start = f"diffusion_models/{model.facts.release}_{model.facts.kind}"
    transformers = {f"{start}_{expert}_noise_tiny": part for expert, part in model.experts.items()}
    for stem, part in (transformers or {f"{start}_tiny": model.transformer}).items():
        save_safetensors(folder / f"{stem}.safetensors", wan_key_map().to_released(part.state))
        # Real files need no config: their heads are all 128 wide.
        write_json(folder / f"{stem}.json", _released_config(model))
    vae = model.vae_release.key_map().to_released(model.vae.state)
    save_safetensors(folder / "vae" / model.vae_release.comfy_file, vae)
    text = dict(model.text_encoder.state)
    spiece = model.tokenizer / "spiece.model"
    if spiece.is_file():
        text[SPIECE_TENSOR] = torch.frombuffer(bytearray(spiece.read_bytes()), dtype=torch.uint8)
    save_safetensors(folder / "text_encoders/umt5_xxl_fp16.safetensors", text)
    if model.image_encoder:
        clip = prefixed("vision_model.", model.image_encoder.state) | {"visual_projection.weight": torch.zeros(8, CLIP_WIDTH)}
        save_safetensors(folder / "clip_vision/clip_vision_h.safetensors", clip)


WRITERS: dict[Layout, Callable[[Path, TinyModel], None]] = {
    "diffusers": _write_diffusers,
    "released": _write_released,
    "comfy": _write_comfy,
}
