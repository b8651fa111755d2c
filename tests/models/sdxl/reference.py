"""SDXL as diffusers computes it, and random inputs as its encoders would cache them."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from models.base import ModelFamily
from models.sdxl.sizes import pooled_width
from utils.data.values import Batch
from utils.draw import generator

PIPELINES = {"sdxl": StableDiffusionXLPipeline}
SHAPES = ((8, 8), (4, 12))
CHUNKS = (1, 2)
"""Of the captions of the two samples."""


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating shapes."""
    height, width = SHAPES[index % 2]

    def field(name: str, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, place)) for place, shape in enumerate(shapes)]

    pooled = pooled_width(family.config)
    widths = {"text_l": family.config["cross_attention_dim"] - pooled, "text_g": pooled}
    sizes = [8 * height + 40, 8 * width, 20, 0, 8 * height, 8 * width]
    fields = {
        "latents": field("latents", *[(4, 1, height, width)] * 2),
        "time_ids": [torch.tensor(sizes), torch.tensor([2 * size for size in sizes])],
        "pooled": field("pooled", *[(pooled,)] * 2),
    }
    fields |= {name: field(name, *((77 * chunks, width) for chunks in CHUNKS)) for name, width in widths.items()}
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout."""
    return UNet2DConditionModel.from_pretrained(folder / "unet").train()


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    return model(
        inputs["x"],
        inputs["t"],
        encoder_hidden_states=inputs["text"],
        added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
        return_dict=False,
    )[0]
