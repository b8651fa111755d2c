"""FLUX.1 as diffusers computes it, and random inputs as its encoders would cache them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from models.base import ModelFamily
from tests.models.pictures import as_picture
from utils.data.encoders import EncodeItem
from utils.data.values import Batch
from utils.draw import generator

PIPELINES = {"flux1-dev": FluxPipeline, "flux1-schnell": FluxPipeline, "flux1-kontext": FluxKontextPipeline}
SIZES = ((6, 8), (4, 10))
TEXT_TOKENS = 9


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating sizes, for Kontext with one and with two references."""
    size, references = SIZES[index % 2], 1 + index % 2

    def field(name: str, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, sample)) for sample in range(2)]

    fields = {
        "latents": field("latents", 16, 1, *size),
        "text": field("text", TEXT_TOKENS, family.config["joint_attention_dim"]),
        "pooled": field("pooled", family.config["pooled_projection_dim"]),
    }
    if family.variant == "flux1-kontext":
        fields["references"] = field("references", references, 16, *size)
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout."""
    return FluxTransformer2DModel.from_pretrained(folder / "transformer").train()


def packed(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def positions(height: int, width: int) -> Tensor:
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    x = inputs["x"]
    height, width = x.shape[2:]
    tokens, ids = [packed(x)], [positions(height, width)]
    for number, reference in enumerate(inputs["references"].unbind(1) if "references" in inputs else ()):
        assert number < 2
        # The second one beside the first where that is the shorter side, else below it.
        beside = torch.tensor([0, 0, width // 2] if height > width else [0, height // 2, 0]) * number
        tokens.append(packed(reference))
        ids.append(positions(height, width) + torch.tensor([1, 0, 0]) + beside)
    output = model(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["t"],
        guidance=inputs.get("guidance"),
        img_ids=torch.cat(ids),
        txt_ids=torch.zeros(inputs["text"].shape[1], 3),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(output[:, : tokens[0].shape[1]], 8 * height, 8 * width, 8)


def call_pipeline(pipeline: DiffusionPipeline, item: EncodeItem, x: Tensor) -> None:
    """One step of the pipeline for the item's caption and pictures, from the noisy latents ``x`` that ``prepare_inputs`` made."""
    height, width = (8 * size for size in x.shape[2:])
    editing = {"image": as_picture(item.controls[0]), "_auto_resize": False, "max_area": width * height} if item.controls else {}
    pipeline(
        prompt=item.caption,
        height=height,
        width=width,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=packed(x),
        output_type="latent",
        max_sequence_length=512 if pipeline.transformer.config.guidance_embeds else 256,
        **editing,
    )
