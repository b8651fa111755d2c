"""Tiny random SDXL models in the layouts of the real releases, to try and to test everything without weights.

All layouts of one seed and scale hold the same weights.  Every parameter is random (norms near 1), so that a part which is read
wrongly or left out shows in the output.  Of the UNet's heads and norms single files tell nothing: a config lies beside.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.base import Layout
from models.common import clip
from models.common.text_encoders import CLIP_NAMES, find_tokenizer
from models.common.tiny import CLIP_ENDS, Part, State, prefixed, write_clip_tokenizer, write_json
from models.sdxl.networks import LATENT_CHANNELS, NETWORKS, PREFIXES
from models.sdxl.sizes import NUM_SIZES, VAE_SCALE
from utils.weights.named import save_safetensors

VARIANTS = ("sdxl",)
CHANNELS, HEADS, DEPTHS = (8, 16, 32), (1, 2, 4), (1, 1, 2)
"""Of the UNet's three levels; the first has no attention, as in the release."""
SIZE_DIM = 8
CLIP_L_WIDTH, CLIP_G_WIDTH = clip.HEAD_DIM, 2 * clip.HEAD_DIM
CLIP_LAYERS = 3
VAE_WIDTH, VAE_LEVELS = 32, 4
CHECKPOINT = "sd_xl_base_1.0"
TOKENIZER_FOLDERS = {
    "diffusers": ("tokenizer", "tokenizer_2"),
    "released": ("tokenizer",),
    "comfy": ("text_encoders/clip-vit-large-patch14",),
}


@dataclass(frozen=True)
class TinyModel:
    transformer: Part
    vae: Part
    text_encoder: Part
    text_encoder_2: Part

    def parts(self) -> dict[str, Part]:
        return vars(self)

    def released(self, name: str) -> State:
        """A part's weights as the release has them, without prefix."""
        return NETWORKS[name].key_map().to_released(self.parts()[name].state)


def write_tiny(variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1, tokenizer: Path | None = None) -> None:
    """Write a model below ``folder``; the same bytes for the same arguments.

    ``scale`` multiplies the UNet's widths and the depth of its attentions; the other networks stay tiny.  ``tokenizer``: a folder
    with CLIP's real tokenizer to copy, instead of the one that is made; the text encoders' vocabularies are made to fit.
    """
    places = [folder / name for name in TOKENIZER_FOLDERS[layout]]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        if tokenizer is None:
            write_clip_tokenizer(place)
        else:
            shutil.copytree(tokenizer, place, dirs_exist_ok=True)
    vocabulary = find_tokenizer(places[0], CLIP_NAMES).load(max_tokens=2).vocabulary
    WRITERS[layout](folder, tiny_model(vocabulary, seed, scale))


def tiny_model(vocabulary: int, seed: int, scale: int) -> TinyModel:
    """The model's networks."""

    def unet() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=tuple(scale * width for width in CHANNELS),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[scale * depth if level else depth for level, depth in enumerate(DEPTHS)],
            attention_head_dim=[scale * heads for heads in HEADS],
            cross_attention_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
            use_linear_projection=True,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_DIM,
            projection_class_embeddings_input_dim=NUM_SIZES * SIZE_DIM + CLIP_G_WIDTH,
        )

    def vae() -> nn.Module:
        return AutoencoderKL(
            block_out_channels=(VAE_WIDTH,) * VAE_LEVELS,
            down_block_types=("DownEncoderBlock2D",) * VAE_LEVELS,
            up_block_types=("UpDecoderBlock2D",) * VAE_LEVELS,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            sample_size=64,
            scaling_factor=VAE_SCALE,
            force_upcast=True,
        )

    def clip_config(width: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=CLIP_LAYERS,
            num_attention_heads=width // clip.HEAD_DIM,
            hidden_act=activation,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )

    return TinyModel(
        transformer=Part.made("transformer", unet, seed),
        vae=Part.made("vae", vae, seed),
        text_encoder=Part.made("text_encoder", lambda: CLIPTextModel(clip_config(CLIP_L_WIDTH, "quick_gelu")), seed),
        text_encoder_2=Part.made("text_encoder_2", lambda: CLIPTextModelWithProjection(clip_config(CLIP_G_WIDTH, "gelu")), seed),
    )


def _write_diffusers(folder: Path, model: TinyModel) -> None:
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    EulerDiscreteScheduler(**scheduler, steps_offset=1).save_pretrained(folder / "scheduler")
    start, end = CLIP_ENDS
    for name, pad in {"tokenizer": end, "tokenizer_2": "!"}.items():
        tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
        write_json(folder / name / "special_tokens_map.json", tokens)
        told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": clip.TOKENS}
        write_json(folder / name / "tokenizer_config.json", {**told, **tokens})
    for name, part in {"unet": model.transformer, "vae": model.vae}.items():
        part.module.save_config(folder / name)
        save_safetensors(folder / name / "diffusion_pytorch_model.safetensors", part.state, {"format": "pt"})
    # Text encoder 1 as older transformers wrote it, and as the released folder has it.
    states = {"text_encoder": prefixed("text_model.", model.text_encoder.state), "text_encoder_2": model.text_encoder_2.state}
    for name, state in states.items():
        model.parts()[name].module.config.save_pretrained(folder / name)
        save_safetensors(folder / name / "model.safetensors", state, {"format": "pt"})


def _write_unet_config(path: Path, model: TinyModel) -> None:
    # Real files need none: their heads are all 64 wide.
    config = model.transformer.module.config
    told = ("attention_head_dim", "norm_num_groups", "addition_time_embed_dim")
    write_json(path, {"_class_name": "UNet2DConditionModel", **{name: config[name] for name in told}})


def _write_released(folder: Path, model: TinyModel) -> None:
    parts = [prefixed(prefix, model.released(name)) for name, prefix in PREFIXES.items()]
    save_safetensors(folder / f"{CHECKPOINT}.safetensors", {name: tensor for part in parts for name, tensor in part.items()})
    _write_unet_config(folder / f"{CHECKPOINT}.json", model)


def _write_comfy(folder: Path, model: TinyModel) -> None:
    save_safetensors(folder / f"diffusion_models/{CHECKPOINT}.safetensors", model.released("transformer"))
    _write_unet_config(folder / f"diffusion_models/{CHECKPOINT}.json", model)
    save_safetensors(folder / "vae/sdxl_vae.safetensors", model.released("vae"))
    save_safetensors(folder / "text_encoders/clip_l.safetensors", model.released("text_encoder"))
    save_safetensors(folder / "text_encoders/clip_g.safetensors", model.text_encoder_2.state)


WRITERS: dict[Layout, Callable[[Path, TinyModel], None]] = {
    "diffusers": _write_diffusers,
    "released": _write_released,
    "comfy": _write_comfy,
}
