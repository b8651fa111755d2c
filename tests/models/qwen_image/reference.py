"""Qwen-Image as diffusers computes it, and random inputs as its encoders would cache them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn

from models.base import ModelFamily
from utils.data.values import Batch
from utils.draw import generator


@dataclass(frozen=True)
class WithoutProcessor:
    """A pipeline opened without its processor, which transformers cannot make where torchvision is missing."""

    pipeline: type[DiffusionPipeline]

    def from_pretrained(self, folder: Path) -> DiffusionPipeline:
        return self.pipeline.from_pretrained(folder, processor=None)


PIPELINES = {
    "qwen-image": QwenImagePipeline,
    "qwen-image-edit": WithoutProcessor(QwenImageEditPipeline),
    "qwen-image-edit-plus": WithoutProcessor(QwenImageEditPlusPipeline),
    "qwen-image-edit-2511": WithoutProcessor(QwenImageEditPlusPipeline),
}
REFERENCES = {"qwen-image": 0, "qwen-image-edit": 1, "qwen-image-edit-plus": 2, "qwen-image-edit-2511": 2}
SHAPES = ((8, 8), (4, 12))


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating shapes; the captions of every other one are of the same length."""
    height, width = SHAPES[index % 2]
    text_dim = family.config["joint_attention_dim"]
    references = REFERENCES[family.variant]

    def field(name: str, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, sample)) for sample in range(2)]

    lengths = ((7, 12), (9, 9))[index // 2 % 2]
    fields = {
        "latents": field("latents", 16, 1, height, width),
        "text": [
            torch.randn(length, text_dim, generator=generator("text", index, sample)) for sample, length in enumerate(lengths)
        ],
    }
    if references:
        fields["references"] = field("references", references, 16, 1, height, width)
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout."""
    return QwenImageTransformer2DModel.from_pretrained(folder / "transformer").train()


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    grids = [tuple(grid) for grid in inputs["grids"].tolist()]
    _, rows, columns = grids[0]
    tokens = model(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text"],
        encoder_hidden_states_mask=inputs.get("text_mask"),
        img_shapes=[grids] * len(inputs["x"]),
        return_dict=False,
    )[0][:, : rows * columns]
    # As the pipeline does it at the end: the latents' size is given in pixels.
    return QwenImagePipeline._unpack_latents(tokens, height=16 * rows, width=16 * columns, vae_scale_factor=8)
