"""FLUX.2 as diffusers computes it, and random inputs as its encoders would cache them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from torch import Tensor, nn

from models.base import ModelFamily
from tests.models.pictures import as_picture
from utils.data.encoders import EncodeItem
from utils.data.values import Batch
from utils.draw import generator

PIPELINES = {"flux2-dev": Flux2Pipeline, "flux2-klein": Flux2KleinPipeline}
SHAPES = ((4, 6), (3, 2))
REFERENCES = (0, 2)
"""Of the samples of alternating micro-batches: to make a picture, and to edit two."""
TEXT_TOKENS = 20


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating shapes and numbers of references."""
    height, width = SHAPES[index % 2]
    count = REFERENCES[index % 2]

    def field(name: str, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, sample)) for sample in range(2)]

    channels = family.config["in_channels"]
    fields = {
        "latents": field("latents", channels, 1, height, width),
        "references": field("references", count, channels, height, width),
        "text": field("text", TEXT_TOKENS, family.config["joint_attention_dim"]),
    }
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout."""
    return Flux2Transformer2DModel.from_pretrained(folder / "transformer").train()


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made, packed by diffusers: what the last layer calls ``prediction``."""
    latents = inputs["x"].squeeze(2)
    tokens, ids = Flux2Pipeline._pack_latents(latents), Flux2Pipeline._prepare_latent_ids(latents)
    target = tokens.shape[1]
    if "references" in inputs:
        pictures = inputs["references"].unbind(1)
        reference_ids = Flux2Pipeline._prepare_image_ids([picture[:1] for picture in pictures])
        tokens = torch.cat([tokens, *map(Flux2Pipeline._pack_latents, pictures)], dim=1)
        ids = torch.cat([ids, reference_ids.repeat(len(ids), 1, 1)], dim=1)
    output = model(
        hidden_states=tokens,
        timestep=inputs["t"],
        guidance=inputs.get("guidance"),
        encoder_hidden_states=inputs["text"],
        txt_ids=Flux2Pipeline._prepare_text_ids(inputs["text"]),
        img_ids=ids,
        return_dict=False,
    )[0]
    return Flux2Pipeline._unpack_latents_with_ids(output[:, :target], ids[:, :target]).unsqueeze(2)


def call_pipeline(pipeline: DiffusionPipeline, item: EncodeItem, x: Tensor) -> None:
    """One step of the pipeline for the item's caption and pictures, from the noisy latents ``x`` that ``prepare_inputs`` made."""
    height, width = (16 * size for size in x.shape[3:])
    pipeline(
        prompt=item.caption,
        image=[as_picture(control) for control in item.controls] or None,
        height=height,
        width=width,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=x[:, :, 0],
        output_type="latent",
    )
