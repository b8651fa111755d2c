"""SD3 and SD3.5: the family's contract."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from models.base import Layout, ModelFamily
from models.sd3 import encoders, files, keys, tiny
from models.sd3.layers import sd3_layers
from models.sd3.networks import FILE_FACTS
from models.sd3.options import Sd3Options
from models.sd3.sizes import variant_of
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, MicroBatch, SizeRules
from utils.diffusion.paths import flow_path
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_format import LoraFormat
from utils.formats.recognise import FileFacts
from utils.pipeline.layer import PipelineLayer
from utils.runtime import DTYPES
from utils.weights.keymap import KeyMap
from utils.weights.named import WeightSource

MODEL_TIMESTEPS = 1000
SHIFT = 3.0
"""Of training at 1024 x 1024 and of inference (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
PIXELS_PER_LATENT = 8
POSITIONS = "pos_embed.pos_embed"
ARCHITECTURES = {
    "sd3-medium": "stable-diffusion-3-medium",
    "sd35-large": "stable-diffusion-3.5-large",
    "sd35-medium": "stable-diffusion-3.5-medium",
}


class Family(ModelFamily):
    """SD3 and SD3.5."""

    Options: ClassVar[type[Sd3Options]] = Sd3Options
    variants: ClassVar[tuple[str, ...]] = tiny.VARIANTS
    parts: ClassVar[Mapping[str, str]] = {
        "attention": r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out|norm_[qk])|attn2)",
        "feed_forward": r"transformer_blocks\.\d+\.ff",
        "text_branch": r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])|ff_context)",
        "modulation": r"transformer_blocks\.\d+\.norm1(_context)?",
        "embedders": r"pos_embed|context_embedder|time_text_embed",
        "output": r"norm_out|proj_out",
    }
    # Every Linear of a block but the modulation; of the second attention too.
    adapter_targets: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )
    # Diffusers loads nothing else, and ComfyUI reads it too.  Diffusers ignores `.alpha` here.
    lora_format: ClassVar[LoraFormat] = LoraFormat(prefix="transformer.", names="diffusers")
    file_facts: ClassVar[FileFacts] = FILE_FACTS

    def __init__(self, options: Sd3Options):
        self.options = options
        self.files = files.find_files(options)
        self.config = self.files.transformer.config
        self.variant = variant_of(self.config)
        side = PIXELS_PER_LATENT * self.config["patch_size"]
        self.size_rules = SizeRules(multiple=side, frame_step=None, fps=None, token_side=side)
        self.timesteps = self.timestep_distribution(SHIFT)
        self.dropout = {"clip_l": options.clip_l_dropout, "clip_g": options.clip_g_dropout, "t5": options.t5_dropout}

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.sd3_encoders(self.files, DTYPES[self.options.dtype], self.options.t5_max_tokens)

    def build_transformer(self) -> nn.Module:
        """All parameters in the weights' dtype.  The table of positions, a buffer, stays in fp32."""
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        transformer = SD3Transformer2DModel.from_config(self.config)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        return transformer

    def weights(self) -> WeightSource:
        return self.files.transformer.source

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return sd3_layers(transformer)

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the embed layer (see ``layers.py``) and ``velocity`` [B, 16, H, W] fp32.

        UserError for pictures that are larger than the model's table of positions.
        """
        inputs: dict[str, list[Tensor]] = {"x": [], "t": [], "text": [], "pooled": []}
        velocities = []
        for index, key in enumerate(batch.keys):
            sample = {name: values[index] for name, values in batch.fields.items()}
            latents = sample["latents"][:, 0]
            self._check_size(latents, key)
            t = self.timesteps.at(draw.quantile(key, "timestep"))
            path = flow_path(latents, draw.normal(key, "noise", tuple(latents.shape)), t)
            text, pooled = self._text(sample, key, draw)
            velocities.append(path.velocity)
            inputs["x"].append(path.noisy)
            inputs["t"].append(torch.tensor(MODEL_TIMESTEPS * t, dtype=torch.float32))
            inputs["text"].append(text)
            inputs["pooled"].append(pooled)
        return MicroBatch(
            inputs={name: torch.stack(values) for name, values in inputs.items()},
            target={"velocity": torch.stack(velocities)},
        )

    def _text(self, sample: dict[str, Tensor], key: str, draw: Draw) -> tuple[Tensor, Tensor]:
        """(text [77 + T5's tokens, joint width], pooled [pooled width]), of which dropped encoders' parts are zeros.

        Zeros, as in the model's training (Esser et al. 2024, arXiv 2403.03206), not the states of an empty caption.
        """
        kept = {name: self._keeps(name, key, draw) for name in self.dropout}
        clip = torch.cat([kept["clip_l"] * sample["clip_l"], kept["clip_g"] * sample["clip_g"]], dim=-1)
        pooled = torch.cat([kept["clip_l"] * sample["clip_l_pooled"], kept["clip_g"] * sample["clip_g_pooled"]])
        width = self.config["joint_attention_dim"]
        t5 = sample["text"] if self.options.t5 else clip.new_zeros(self.options.t5_max_tokens, width)
        return torch.cat([nn.functional.pad(clip, (0, width - clip.shape[-1])), kept["t5"] * t5]), pooled

    def _keeps(self, encoder: str, key: str, draw: Draw) -> bool:
        """Whether the sample's caption reaches the model through this encoder.  In evaluation, where the time is fixed, always."""
        if draw.fixed_time is not None:
            return True
        return float(torch.rand((), generator=draw.generator(key, f"{encoder} dropout"))) >= self.dropout[encoder]

    def _check_size(self, latents: Tensor, key: str) -> None:
        largest = self.config["pos_embed_max_size"] * self.config["patch_size"]
        if max(latents.shape[-2:]) > largest:
            height, width = (PIXELS_PER_LATENT * size for size in latents.shape[-2:])
            raise UserError(
                f"{key} has {width} x {height} pixels; {self.variant} has positions for {PIXELS_PER_LATENT * largest} a side: "
                "lower `resolutions` or the aspect ratios of the data set"
            )

    def key_map(self) -> KeyMap:
        return keys.sd3_key_map(self.config["num_layers"])

    def companions(self) -> Mapping[str, Tensor]:
        """The table of positions, which is not trained: without it no program recognises the model's size."""
        return {self.key_map().released_name(POSITIONS): self.weights().read(POSITIONS)}

    def export_metadata(self) -> dict[str, str]:
        return {
            "modelspec.architecture": ARCHITECTURES[self.variant],
            "modelspec.implementation": "https://github.com/Stability-AI/sd3.5",
        }

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)
