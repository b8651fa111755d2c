"""Wan 2.1 text to video and image to video: the family's contract."""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from diffusers import WanTransformer3DModel
from pydantic import Field
from torch import Tensor, nn

from models.base import Layout, ModelFamily
from models.wan import encoders, files, keys, tiny
from models.wan.layers import wan_layers
from utils.checkpoints.export import LoraFormat
from utils.checkpoints.keymap import KeyMap
from utils.checkpoints.weights import WeightSource
from utils.config.schema import ModelOptions
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, MicroBatch, SizeRules
from utils.diffusion.paths import flow_path
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.pipeline.layer import PipelineLayer
from utils.runtime import DTYPES

TEXT_TOKENS = 512
"""Text length the model was trained with; the image-to-video attention takes exactly the last 512 context tokens as text."""
FRAMES_PER_LATENT = 4
MODEL_TIMESTEPS = 1000


class WanOptions(ModelOptions):
    """``[model]`` for Wan."""

    shift: Annotated[float, Field(gt=0)] | None = 3.0
    """Constant timestep shift s: t' = s t / (1 + (s - 1) t). Inference at 480p uses 3, at 720p 5."""


class Family(ModelFamily):
    """Wan 2.1."""

    Options: ClassVar[type[ModelOptions]] = WanOptions
    variants: ClassVar[tuple[str, ...]] = tiny.VARIANTS
    # Every Linear of a block, of the added image attention too; not the embedders and not the head.
    adapter_targets: ClassVar[str] = (
        r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"
    )
    # ComfyUI reads original names only; diffusers reads them as well, and applies strength 1 to files without `.alpha`.
    lora_format: ClassVar[LoraFormat] = LoraFormat(prefix="diffusion_model.", names="released")

    def __init__(self, options: WanOptions):
        self.options = options
        self.files = files.find_files(options)
        self.config = files.transformer_config(self.files)
        self.variant = files.variant_of(self.config)
        self.size_rules = SizeRules(multiple=16, frame_step=FRAMES_PER_LATENT, fps=16.0)
        self.timesteps = TimestepDistribution(
            method=options.timestep_sample_method,
            scale=options.sigmoid_scale,
            shift=options.shift or 1.0,
            low=options.min_t,
            high=options.max_t,
        )

    @property
    def takes_image(self) -> bool:
        return self.variant == "wan-i2v"

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.wan_encoders(self.files, DTYPES[self.options.dtype], takes_image=self.takes_image)

    def build_transformer(self) -> nn.Module:
        """In the weights' dtype, with what diffusers keeps in fp32 (time embedder, modulation tables, norms) in fp32."""
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        transformer = WanTransformer3DModel.from_config(self.config)
        keep = WanTransformer3DModel._keep_in_fp32_modules
        for name, parameter in transformer.named_parameters():
            if not any(part in keep for part in name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return transformer

    def weights(self) -> WeightSource:
        return WeightSource(self.files.transformer, self.key_map())

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return wan_layers(transformer)

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the embed layer (see ``layers.py``) and ``velocity`` [B, 16, F, H, W] fp32."""
        inputs: dict[str, list[Tensor]] = {"x": [], "t": [], "text": []}
        velocities = []
        for index, key in enumerate(batch.keys):
            sample = {name: values[index] for name, values in batch.fields.items()}
            latents = sample["latents"]
            t = self.timesteps.at(draw.quantile(key, "timestep"))
            path = flow_path(latents, draw.normal(key, "noise", tuple(latents.shape)), t)
            velocities.append(path.velocity)
            inputs["x"].append(torch.cat([path.noisy, *self._first_frame_channels(sample)]))
            inputs["t"].append(torch.tensor(MODEL_TIMESTEPS * t, dtype=torch.float32))
            inputs["text"].append(nn.functional.pad(sample["text"], (0, 0, 0, TEXT_TOKENS - len(sample["text"]))))
            if self.takes_image:
                inputs.setdefault("clip", []).append(sample["clip"])
        return MicroBatch(
            inputs={name: torch.stack(values) for name, values in inputs.items()},
            target={"velocity": torch.stack(velocities)},
        )

    def _first_frame_channels(self, sample: dict[str, Tensor]) -> list[Tensor]:
        """For image to video: mask [4, F, H, W] and condition [16, F, H, W].

        One mask channel per pixel frame of a latent frame, 1 where it is known: all four at the first latent frame (diffusers'
        WanImageToVideoPipeline repeats the first pixel frame four times).
        """
        if not self.takes_image:
            return []
        condition = sample["condition"].float()
        mask = torch.zeros(FRAMES_PER_LATENT, *condition.shape[1:])
        mask[:, 0] = 1
        return [mask, condition]

    def key_map(self) -> KeyMap:
        return keys.wan_key_map()

    def export_metadata(self) -> dict[str, str]:
        size = "14b" if self.config["num_layers"] == 40 else "1.3b"
        architecture = f"{self.variant.replace('wan-', 'wan2.1-')}-{size}"
        return {"modelspec.architecture": architecture, "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1"}

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)
