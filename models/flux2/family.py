"""FLUX.2 dev and Klein: the family's contract."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from diffusers import Flux2Transformer2DModel
from pydantic import Field
from torch import Tensor, nn

from models.base import Layout, ModelFamily
from models.flux2 import encoders, files, keys, networks, tiny
from models.flux2.layers import flux2_layers
from models.flux2.networks import FILE_FACTS
from utils.config.schema import ModelOptions
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, ControlRules, MicroBatch, SizeRules
from utils.diffusion.paths import flow_path
from utils.diffusion.timesteps import resolution_shift
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_format import LoraFormat
from utils.formats.recognise import FileFacts
from utils.pipeline.layer import PipelineLayer
from utils.runtime import DTYPES
from utils.weights.keymap import KeyMap
from utils.weights.named import WeightSource

log = logging.getLogger(__name__)

MOST_REFERENCES = 10
"""Pictures that the release takes to edit."""
KLEIN_SIZES = {24: "-4b", 32: "-9b"}
"""By the number of heads."""


class Flux2Options(ModelOptions):
    """``[model]`` for FLUX.2."""

    shift: Annotated[float, Field(gt=0)] | None = None
    """Constant timestep shift s: t' = s t / (1 + (s - 1) t). Default: it grows with the picture, from 1.9 at 512 x 512 to 3.2 at
    1024 x 1024."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """The guidance that FLUX.2-dev is told in training. Klein is told none."""


class Family(ModelFamily):
    """FLUX.2."""

    Options: ClassVar[type[ModelOptions]] = Flux2Options
    variants: ClassVar[tuple[str, ...]] = tiny.VARIANTS
    parts: ClassVar[Mapping[str, str]] = {
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out|norm_[qk])",
        "feed_forward": r"transformer_blocks\.\d+\.ff",
        "text_branch": r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])|ff_context)",
        "single_blocks": r"single_transformer_blocks\.\d+",
        "modulation": r"(double|single)_stream_modulation.*",
        "embedders": r"x_embedder|context_embedder|time_guidance_embed",
        "output": r"norm_out|proj_out",
    }
    # Every Linear of the blocks; not the embedders, the shared modulation and the head.
    adapter_targets: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    # ComfyUI reads the release's names alone; diffusers reads them too, but refuses `.alpha` beside them.
    lora_format: ClassVar[LoraFormat] = LoraFormat(prefix="diffusion_model.", names="released")
    file_facts: ClassVar[FileFacts] = FILE_FACTS

    def __init__(self, options: Flux2Options):
        self.options = options
        self.files = files.find_files(options)
        self.config = self.files.config
        self.variant = networks.variant_of(self.config)
        self.size_rules = SizeRules(multiple=16, frame_step=None, fps=None)
        self.controls = ControlRules(0, MOST_REFERENCES)
        if not self.takes_guidance and "guidance" in options.model_fields_set:
            log.warning("model.guidance has no effect: FLUX.2 Klein is told no guidance")

    @property
    def takes_guidance(self) -> bool:
        return self.config["guidance_embeds"]

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.flux2_encoders(self.files, DTYPES[self.options.dtype])

    def build_transformer(self) -> nn.Module:
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        transformer = Flux2Transformer2DModel.from_config(self.config)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        return transformer

    def weights(self) -> WeightSource:
        return WeightSource(self.files.transformer, self.key_map())

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return flux2_layers(transformer)

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the embed layer (see ``layers.py``) and ``velocity`` [B, 128, 1, h, w] fp32."""
        inputs: dict[str, list[Tensor]] = {"x": [], "t": [], "text": []}
        velocities = []
        for index, key in enumerate(batch.keys):
            sample = {name: values[index] for name, values in batch.fields.items()}
            latents = sample["latents"]
            shift = resolution_shift(latents.shape[-2] * latents.shape[-1])
            t = self.timestep_distribution(shift).at(draw.quantile(key, "timestep"))
            path = flow_path(latents, draw.normal(key, "noise", tuple(latents.shape)), t)
            velocities.append(path.velocity)
            inputs["x"].append(path.noisy)
            inputs["t"].append(torch.tensor(t, dtype=torch.float32))
            inputs["text"].append(sample["text"])
            if self.takes_guidance:
                inputs.setdefault("guidance", []).append(torch.tensor(self.options.guidance, dtype=torch.float32))
        if references := _references(batch):
            inputs["references"] = references
        return MicroBatch(
            inputs={name: torch.stack(values) for name, values in inputs.items()},
            target={"velocity": torch.stack(velocities)},
        )

    def key_map(self) -> KeyMap:
        return keys.flux2_key_map()

    def export_metadata(self) -> dict[str, str]:
        size = "" if self.takes_guidance else KLEIN_SIZES.get(self.config["num_attention_heads"], "")
        return {
            "modelspec.architecture": f"{self.variant.replace('flux2', 'flux-2')}{size}",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        }

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)


def _references(batch: Batch) -> list[Tensor]:
    """The clean latents of each sample's control pictures; none if no sample has any.  UserError if their numbers differ."""
    references = batch.fields.get("references", [])
    counts = {len(each): key for key, each in zip(batch.keys, references, strict=False)}
    if len(counts) > 1:
        told = " and ".join(f"{key} has {count}" for count, key in sorted(counts.items()))
        raise UserError(
            f"samples of one micro-batch need the same number of control pictures; {told}. Give them the same number, or set "
            "micro_batch_size_per_gpu = 1"
        )
    return references if any(counts) else []
