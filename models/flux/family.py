"""FLUX.1: the family's contract."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from diffusers import FluxTransformer2DModel
from pydantic import Field
from torch import Tensor, nn

from models.base import Layout, ModelFamily
from models.flux import encoders, files, keys, tiny
from models.flux.layers import flux_layers
from models.flux.networks import FILE_FACTS
from utils.config.schema import FilePath, ModelOptions
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

ARCHITECTURES = {
    "flux1-dev": "flux-1-dev",
    "flux1-schnell": "flux-1-schnell",
    "flux1-kontext": "flux-1-kontext-dev",
}


CONTROLS = {
    "flux1-dev": ControlRules(0, 0, 'train Kontext (model.variant = "kontext")'),
    "flux1-schnell": ControlRules(0, 0),
    "flux1-kontext": ControlRules(1, None, 'train dev (model.variant = "dev")'),
}


class FluxOptions(ModelOptions):
    """``[model]`` for FLUX.1."""

    variant: Literal["dev", "kontext"] | None = None
    """`kontext` edits reference pictures (`control_path` in the dataset), `dev` does not. Default: what the name of the file or the
    `model_index.json` of the folder says, for the weights do not. Schnell is known by its weights."""
    text_encoder_2_path: FilePath | None = None
    """The T5 text encoder alone: a `.safetensors` file or a folder. (`text_encoder_path` is CLIP-L.)"""
    tokenizer_2_path: FilePath | None = None
    """The folder of T5's tokenizer. (`tokenizer_path` is CLIP's.)"""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """The guidance value that dev and Kontext are given in training; 1 is usual, whatever value pictures are made with later."""


class Family(ModelFamily):
    """FLUX.1 dev, schnell and Kontext."""

    Options: ClassVar[type[ModelOptions]] = FluxOptions
    variants: ClassVar[tuple[str, ...]] = tiny.VARIANTS
    parts: ClassVar[Mapping[str, str]] = {
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out|norm_[qk])",
        "feed_forward": r"transformer_blocks\.\d+\.ff",
        "text_branch": r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])|ff_context)",
        "single_blocks": r"single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)",
        "modulation": r"transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm",
        "embedders": r"x_embedder|context_embedder|time_text_embed",
        "output": r"norm_out|proj_out",
    }
    # Every Linear of a block but the modulations; not the embedders and not the head.
    adapter_targets: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
    )
    # ComfyUI and diffusers read these names; diffusers takes released names after `diffusion_model.` and then loads nothing.
    lora_format: ClassVar[LoraFormat] = LoraFormat(prefix="transformer.", names="diffusers")
    file_facts: ClassVar[FileFacts] = FILE_FACTS

    def __init__(self, options: FluxOptions):
        self.options = options
        self.files = files.find_files(options)
        self.config = self.files.transformer.config
        self.variant = self.files.variant
        self.size_rules = SizeRules(multiple=16, frame_step=None, fps=None)
        self.controls = CONTROLS[self.variant]
        if not self.has_guidance and "guidance" in options.model_fields_set:
            log.warning("model.guidance has no effect: schnell is not given a guidance value")

    @property
    def has_guidance(self) -> bool:
        return self.config["guidance_embeds"]

    @property
    def has_references(self) -> bool:
        return self.variant == "flux1-kontext"

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.flux_encoders(self.files, DTYPES[self.options.dtype])

    def build_transformer(self) -> nn.Module:
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        # diffusers' own `to` warns of modules to be kept in fp32, of which this model has none.
        return nn.Module.to(FluxTransformer2DModel.from_config(self.config), dtype)

    def weights(self) -> WeightSource:
        return self.files.transformer.source

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return flux_layers(transformer)

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the embed layer (see ``layers.py``) and ``velocity`` [B, 16, h, w] fp32."""
        inputs: dict[str, list[Tensor]] = {"x": [], "t": [], "text": [], "pooled": []}
        velocities = []
        for index, key in enumerate(batch.keys):
            sample = {name: values[index] for name, values in batch.fields.items()}
            latents = sample["latents"][:, 0]
            t = self.timestep_distribution(self._shift(latents)).at(draw.quantile(key, "timestep"))
            path = flow_path(latents, draw.normal(key, "noise", tuple(latents.shape)), t)
            velocities.append(path.velocity)
            inputs["x"].append(path.noisy)
            inputs["t"].append(torch.tensor(t, dtype=torch.float32))
            inputs["text"].append(sample["text"])
            inputs["pooled"].append(sample["pooled"])
            if self.has_guidance:
                inputs.setdefault("guidance", []).append(torch.tensor(self.options.guidance, dtype=torch.float32))
            if self.has_references:
                inputs.setdefault("references", []).append(sample["references"].float())
        if self.has_references and len({len(references) for references in inputs["references"]}) > 1:
            raise UserError(
                f"{', '.join(batch.keys)}: the pictures of a micro-batch have different numbers of reference pictures; "
                "set micro_batch_size_per_gpu = 1, or give each picture as many"
            )
        return MicroBatch(
            inputs={name: torch.stack(values) for name, values in inputs.items()},
            target={"velocity": torch.stack(velocities)},
        )

    def _shift(self, latents: Tensor) -> float:
        """The release's: for dev and Kontext it grows with the number of the target's tokens, for schnell there is none."""
        return resolution_shift(latents.shape[1] * latents.shape[2] // 4) if self.has_guidance else 1.0

    def key_map(self) -> KeyMap:
        return keys.flux_key_map()

    def export_metadata(self) -> dict[str, str]:
        return {
            "modelspec.architecture": ARCHITECTURES[self.variant],
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)
