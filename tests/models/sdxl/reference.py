"""SDXL as diffusers computes it, and random inputs as its encoders would cache them.

``plain_model`` with the text encoders' names is the model that trains them: all of it diffusers' and transformers' own modules.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.base import ModelFamily
from models.sdxl.encoders import time_ids
from models.sdxl.sizes import pooled_width
from models.sdxl.text_encoders import TEXT_ENCODERS, trained_text_encoders
from utils.data.encoders import EncodeItem
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
    for name in trained_text_encoders(family.options):
        encoder = TEXT_ENCODERS[name]
        fields[f"ids_{encoder.tower}"] = [token_ids(family, name, index, sample) for sample in range(2)]
        for unused in {"text_encoder": ("text_l",), "text_encoder_2": ("text_g", "pooled")}[name]:
            del fields[unused]
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def token_ids(family: ModelFamily, name: str, index: int, sample: int) -> Tensor:
    """[chunks, 77]: each chunk with a start, some tokens, the end token and padding; both encoders have the same tokens."""
    config = getattr(family.files, name).config
    rows = []
    for chunk in range(CHUNKS[sample]):
        source = generator("tokens", index, sample, chunk)
        length = int(torch.randint(3, 75, (), generator=source))
        words = torch.randint(1, config["vocab_size"] - 2, (length,), generator=source).tolist()
        end = config["eos_token_id"]
        padding = end if TEXT_ENCODERS[name].pad == "end" else 0
        rows.append([config["bos_token_id"], *words, end, *[padding] * (75 - length)])
    return torch.tensor(rows)


def plain_model(folder: Path, text_encoders: Collection[str] = ()) -> nn.Module:
    """The diffusers model of a folder in diffusers layout; with the text encoders, by the names that they have in training."""
    model = UNet2DConditionModel.from_pretrained(folder / "unet").train()
    if "text_encoder" in text_encoders:
        clip_l = CLIPTextModel.from_pretrained(folder / "text_encoder").train()
        model.add_module("text_encoder", nn.ModuleDict({"text_model": clip_l}))
    if "text_encoder_2" in text_encoders:
        model.add_module("text_encoder_2", CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").train())
    return model


def predict(model: nn.Module, inputs: dict[str, Tensor], clip_skip: int = 0) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    if "rows" in inputs:
        texts = {name: inputs[name] for name in ("text_l", "text_g", "pooled") if name in inputs}
        if "ids_l" in inputs:
            states = model.text_encoder.text_model(inputs["ids_l"], output_hidden_states=True).hidden_states
            texts["text_l"] = states[-2 - clip_skip][inputs["rows"]].flatten(1, 2)
        if "ids_g" in inputs:
            output = model.text_encoder_2(inputs["ids_g"], output_hidden_states=True)
            texts["text_g"] = output.hidden_states[-2 - clip_skip][inputs["rows"]].flatten(1, 2)
            texts["pooled"] = output.text_embeds[inputs["rows"][:, 0]]
        text = torch.cat([texts["text_l"], texts["text_g"]], dim=-1)
        inputs = {**inputs, "text": text, "pooled": texts["pooled"]}
    return model(
        inputs["x"],
        inputs["t"],
        encoder_hidden_states=inputs["text"],
        added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
        return_dict=False,
    )[0]


NOT_GIVEN = ("sample",)
"""The pipeline starts from noise that it scales itself, not from latents of the path."""


def call_pipeline(pipeline: DiffusionPipeline, item: EncodeItem, x: Tensor) -> None:
    """One step of the pipeline for the item's caption and pictures, from the noisy latents ``x`` that ``prepare_inputs`` made."""
    height, width = (8 * size for size in x.shape[2:])
    ids = time_ids(item).tolist()
    pipeline(
        prompt=item.caption,
        height=height,
        width=width,
        num_inference_steps=1,
        guidance_scale=1.0,
        original_size=tuple(ids[:2]),
        crops_coords_top_left=tuple(ids[2:4]),
        target_size=tuple(ids[4:]),
        output_type="latent",
    )
