"""SD3 as diffusers computes it, and random inputs as its encoders would cache them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from models.base import ModelFamily
from models.sd3.tiny import CLIP_G_WIDTH, CLIP_L_WIDTH, T5_WIDTH, VARIANTS
from utils.data.encoders import EncodeItem
from utils.data.values import Batch
from utils.draw import generator

PIPELINES = dict.fromkeys(VARIANTS, StableDiffusion3Pipeline)
SIZES = ((6, 8), (4, 10))
CLIP_TOKENS, T5_TOKENS = 7, 9


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating sizes."""

    def field(name: str, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, sample)) for sample in range(2)]

    fields = {
        "latents": field("latents", family.config["in_channels"], 1, *SIZES[index % 2]),
        "clip_l": field("clip_l", CLIP_TOKENS, CLIP_L_WIDTH),
        "clip_l_pooled": field("clip_l_pooled", CLIP_L_WIDTH),
        "clip_g": field("clip_g", CLIP_TOKENS, CLIP_G_WIDTH),
        "clip_g_pooled": field("clip_g_pooled", CLIP_G_WIDTH),
        "text": field("text", T5_TOKENS, T5_WIDTH),
    }
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout."""
    return SD3Transformer2DModel.from_pretrained(folder / "transformer").train()


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    return model(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        return_dict=False,
    )[0]


def call_pipeline(pipeline: DiffusionPipeline, item: EncodeItem, x: Tensor) -> None:
    """One step of the pipeline for the item's caption and pictures, from the noisy latents ``x`` that ``prepare_inputs`` made."""
    height, width = (8 * size for size in x.shape[2:])
    pipeline(
        prompt=item.caption,
        height=height,
        width=width,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=x,
        output_type="latent",
    )
