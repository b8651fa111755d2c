"""Wan as diffusers computes it, and random inputs as its encoders would cache them."""

from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from models.base import ModelFamily
from utils.data.values import Batch
from utils.draw import generator

PIPELINES = {"wan-t2v": WanPipeline, "wan-i2v": WanImageToVideoPipeline}
SHAPES = ((3, 8, 8), (1, 4, 12))


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating shapes."""
    shape = SHAPES[index % 2]

    def field(name: str, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, sample)) for sample in range(2)]

    text_dim, image_dim = family.config["text_dim"], family.config.get("image_dim")
    fields = {
        "latents": field("latents", 16, *shape),
        "text": [torch.randn(length, text_dim, generator=generator("text", index, length)) for length in (7, 12)],
    }
    if image_dim:
        fields |= {"condition": field("condition", 16, *shape), "clip": field("clip", 257, image_dim)}
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout."""
    return WanTransformer3DModel.from_pretrained(folder / "transformer").train()


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    return model(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text"],
        encoder_hidden_states_image=inputs.get("clip"),
        return_dict=False,
    )[0]
