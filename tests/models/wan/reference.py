"""Wan as diffusers computes it, and random inputs as its encoders would cache them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from models.base import ModelFamily
from tests.models.pictures import as_picture
from utils.data.encoders import EncodeItem
from utils.data.values import Batch
from utils.draw import generator

PIPELINES = {
    "wan-t2v": WanPipeline,
    "wan-i2v": WanImageToVideoPipeline,
    "wan-flf2v": WanImageToVideoPipeline,
    "wan22-t2v": WanPipeline,
    "wan22-i2v": WanImageToVideoPipeline,
    "wan-ti2v": WanPipeline,
}
SHAPES = ((3, 8, 8), (1, 4, 12))
CLIP_TOKENS = 257
EXPERTS = ("transformer", "transformer_2")
"""The two models of Wan 2.2 A14B, for high and for low noise, in the order in which the stream counts them."""
OPTIONS = {"wan22-t2v": {"expert": "high"}, "wan22-i2v": {"expert": "high"}}
"""For tests of one model and its one file; ``test_experts.py`` has those of both."""


def batch(family: ModelFamily, index: int) -> Batch:
    """Micro-batch ``index``: two samples, of alternating shapes."""
    shape = SHAPES[index % 2]

    def field(name: str, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator("reference", index, name, sample)) for sample in range(2)]

    config = family.config
    fields = {
        "latents": field("latents", config["out_channels"], *shape),
        "text": [torch.randn(length, config["text_dim"], generator=generator("text", index, length)) for length in (7, 12)],
    }
    if config["in_channels"] > config["out_channels"]:
        fields["condition"] = field("condition", config["out_channels"], *shape)
    if config["image_dim"]:
        fields["clip"] = field("clip", config["pos_embed_seq_len"] or CLIP_TOKENS, config["image_dim"])
    return Batch(keys=[f"reference/{index}.{sample}#0" for sample in range(2)], fields=fields)


def plain_model(folder: Path) -> nn.Module:
    """The diffusers model of a folder in diffusers layout; of Wan 2.2 A14B both, by their names in diffusers' pipeline."""
    if not (folder / "transformer_2").is_dir():
        return one_model(folder)
    return nn.ModuleDict({name: one_model(folder, name) for name in EXPERTS})


def one_model(folder: Path, name: str = "transformer") -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / name).train()


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own forward on what ``prepare_inputs`` made: what the last layer calls ``prediction``."""
    if "expert" in inputs:
        model = model[EXPERTS[int(inputs["expert"])]]
    clip = inputs.get("clip")
    if clip is not None:
        clip = clip.reshape(-1, CLIP_TOKENS, clip.shape[-1])  # one picture a row
    return model(
        hidden_states=inputs["x"],
        timestep=times_by_token(model, inputs["x"], inputs["t"]),
        encoder_hidden_states=inputs["text"],
        encoder_hidden_states_image=clip,
        return_dict=False,
    )[0]


def times_by_token(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """With a clean first frame the model wants a time for each token, [B, L], not just two, [B, 2]."""
    if t.ndim == 1:
        return t
    _, height, width = (size // patch for size, patch in zip(x.shape[2:], model.config.patch_size, strict=True))
    frame_of_token = torch.arange(x.shape[2]).repeat_interleave(height * width)
    return t[:, frame_of_token.clamp(max=1)]


def call_pipeline(pipeline: DiffusionPipeline, item: EncodeItem, x: Tensor) -> None:
    """One step of the pipeline for the item's caption and pictures, from the noisy latents ``x`` that ``prepare_inputs`` made."""
    _, _, frames, height, width = x.shape
    side = pipeline.vae_scale_factor_spatial
    first, last = (as_picture(item.known_frames.get(name, item.pixels), frame) for name, frame in (("first", 0), ("last", -1)))
    shown = {"image": first} if isinstance(pipeline, WanImageToVideoPipeline) else {}
    if pipeline.transformer.config.pos_embed_seq_len:
        shown["last_image"] = last
    pipeline(
        prompt=item.caption,
        height=height * side,
        width=width * side,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=x[:, : pipeline.transformer.config.out_channels],
        output_type="latent",
        **shown,
    )
