"""Wan 2.1 and 2.2: the family's contract."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from models.base import ExportFile, Layout, ModelFamily
from models.common.joined import JoinedWeights
from models.wan import encoders, files, keys, tiny
from models.wan.experts import PREFIXES, Experts, Routing, expert_layers
from models.wan.layers import wan_layers
from models.wan.networks import FILE_FACTS
from models.wan.options import DEFAULT_SHIFT, WanOptions
from models.wan.variants import VARIANTS, Expert, expert_in, expert_named, trained_timesteps
from utils.config.schema import ModelOptions
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, MicroBatch, SizeRules
from utils.diffusion.paths import flow_path
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_format import LoraFormat
from utils.formats.recognise import FileFacts
from utils.pipeline.layer import PipelineLayer
from utils.runtime import DTYPES
from utils.weights.keymap import KeyMap
from utils.weights.named import NamedWeights, WeightSource

log = logging.getLogger(__name__)

TEXT_TOKENS = 512
"""Text length the model was trained with; the image-to-video attention takes exactly the last 512 context tokens as text."""
FRAMES_PER_LATENT = 4
MODEL_TIMESTEPS = 1000
_EXPERT = r"(transformer(_2)?\.)?"
"""What stands before the names of a weight when both experts are trained."""
SIZES = {(30, 1536): "1.3b", (30, 3072): "5b"}
"""By number and width of the blocks; the others are the 14B models."""


class Family(ModelFamily):
    """Wan 2.1 and 2.2; of the A14B models one transformer or both."""

    Options: ClassVar[type[ModelOptions]] = WanOptions
    variants: ClassVar[tuple[str, ...]] = tuple(VARIANTS)
    parts: ClassVar[Mapping[str, str]] = {
        "self_attention": rf"{_EXPERT}blocks\.\d+\.attn1",
        "cross_attention": rf"{_EXPERT}blocks\.\d+\.(attn2|norm2)",
        "feed_forward": rf"{_EXPERT}blocks\.\d+\.ffn",
        "modulation": rf"{_EXPERT}(blocks\.\d+\.scale_shift_table|condition_embedder\.time_proj)",
        "embedders": rf"{_EXPERT}(patch_embedding|condition_embedder\.(time|text|image)_embedder)",
        "output": rf"{_EXPERT}(scale_shift_table|proj_out)",
    }
    # Every Linear of a block, of the added image attention too; not the embedders and not the head.
    adapter_targets: ClassVar[str] = (
        rf"{_EXPERT}blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"
    )
    # ComfyUI reads original names only; diffusers reads them as well, and applies strength 1 to files without `.alpha`.
    lora_format: ClassVar[LoraFormat] = LoraFormat(prefix="diffusion_model.", names="released")
    file_facts: ClassVar[FileFacts] = FILE_FACTS

    def __init__(self, options: WanOptions):
        self.files = files.find_files(options)
        self.config = files.transformer_config(self.files)
        self.expert = self.files.expert
        self.variant = files.variant_of(self.config, self.expert)
        self.facts = VARIANTS[self.variant]
        self.options = self._with_timesteps(options)
        self.size_rules = SizeRules(
            multiple=self.facts.multiple,
            frame_step=FRAMES_PER_LATENT,
            fps=self.facts.fps,
            token_side=self.facts.multiple,
            known_frames=encoders.KNOWN_FRAMES[self.facts.condition],
        )
        self.timesteps = self.timestep_distribution(DEFAULT_SHIFT)
        self.routing = Routing(self.timesteps, self.facts.boundary) if self.expert == "both" else None
        if self.routing:
            log.info(
                "both transformers of %s are trained, the one for high noise with about %.0f %% of the micro-batches (t >= %g), "
                "the one for low noise with the others; model.expert = 'high' or 'low' trains one alone",
                self.facts.title,
                100 * self.routing.share_of_high,
                self.facts.boundary,
            )

    def _with_timesteps(self, options: WanOptions) -> WanOptions:
        """With the timesteps that the transformer is used for, where the options do not say which to train."""
        low, high = trained_timesteps(self.facts, self.expert)
        low = low if options.min_t is None else options.min_t
        high = high if options.max_t is None else options.max_t
        if low >= high:
            raise UserError(
                f"model.min_t = {low} and model.max_t = {high} leave no timestep to train; "
                f"without them {self.facts.title} has its own limits, and 0 and 1 are all timesteps"
            )
        if self.expert == "both" and not low < self.facts.boundary < high:
            rest = "high" if low >= self.facts.boundary else "low"
            raise UserError(
                f"model.min_t = {low} and model.max_t = {high} leave nothing to one of the two transformers, which meet at "
                f"{self.facts.boundary}; set model.expert = {rest!r} to train the other alone"
            )
        return options.model_copy(update={"min_t": low, "max_t": high})

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.wan_encoders(self.files, DTYPES[self.options.dtype], self.facts.condition)

    def build_transformer(self) -> nn.Module:
        return Experts(self._one_transformer(), self._one_transformer()) if self.routing else self._one_transformer()

    def _one_transformer(self) -> WanTransformer3DModel:
        """In the weights' dtype, with what diffusers keeps in fp32 (time embedder, modulation tables, norms) in fp32."""
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        transformer = WanTransformer3DModel.from_config(self.config)
        keep = WanTransformer3DModel._keep_in_fp32_modules
        for name, parameter in transformer.named_parameters():
            if not any(part in keep for part in name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return transformer

    def weights(self) -> NamedWeights:
        first = WeightSource(self.files.transformer, self.key_map())
        if self.files.transformer_2 is None:
            return first
        second = WeightSource(self.files.transformer_2, self.key_map())
        return JoinedWeights({PREFIXES["high"]: first, PREFIXES["low"]: second})

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return expert_layers(transformer) if self.routing else wan_layers(transformer)

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the embed layer (see ``layers.py``) and ``velocity`` [B, C, F, H, W] fp32.

        For a clean first frame also ``mask`` [B, 1, F, 1, 1], which keeps that frame out of the loss; with both experts
        ``expert`` in the stream (see ``experts.py``).
        """
        expert, times_of = self._timesteps(batch.keys, draw)
        inputs: dict[str, list[Tensor]] = {"x": [], "t": [], "text": []}
        target: dict[str, list[Tensor]] = {"velocity": []}
        for index, key in enumerate(batch.keys):
            sample = {name: values[index] for name, values in batch.fields.items()}
            latents = sample["latents"]
            t = times_of[index]
            path = flow_path(latents, draw.normal(key, "noise", tuple(latents.shape)), t)
            noisy, times = path.noisy, torch.tensor(MODEL_TIMESTEPS * t, dtype=torch.float32)
            # A picture has no frames after the first.
            if self.options.first_frame and latents.shape[1] > 1:
                noisy = torch.cat([latents[:, :1].float(), noisy[:, 1:]], dim=1)
                times = torch.stack([torch.zeros_like(times), times])
                target.setdefault("mask", []).append((torch.arange(latents.shape[1]) > 0).float().view(1, -1, 1, 1))
            inputs["x"].append(torch.cat([noisy, *self._condition_channels(sample)]))
            inputs["t"].append(times)
            inputs["text"].append(nn.functional.pad(sample["text"], (0, 0, 0, TEXT_TOKENS - len(sample["text"]))))
            if self.facts.with_clip:
                inputs.setdefault("clip", []).append(sample["clip"])
            target["velocity"].append(path.velocity)
        chosen = {"expert": torch.tensor(list(PREFIXES).index(expert))} if expert else {}
        return MicroBatch(
            inputs={name: torch.stack(values) for name, values in inputs.items()} | chosen,
            target={name: torch.stack(values) for name, values in target.items()},
        )

    def _timesteps(self, keys: list[str], draw: Draw) -> tuple[Expert | None, list[float]]:
        """The timestep of each sample, and with both experts the one that all of them go through."""
        if self.routing:
            return self.routing.draw(keys, draw)
        return None, [self.timesteps.at(draw.quantile(key, "timestep")) for key in keys]

    def _condition_channels(self, sample: dict[str, Tensor]) -> list[Tensor]:
        """For image to video: mask [4, F, H, W] and condition [16, F, H, W].

        One mask channel per pixel frame of a latent frame, 1 where it is known: all four at the first latent frame (diffusers'
        WanImageToVideoPipeline repeats the first pixel frame four times), the last at the last latent frame if the last frame is
        known.
        """
        if self.facts.condition is None:
            return []
        condition = sample["condition"].float()
        mask = torch.zeros(FRAMES_PER_LATENT, *condition.shape[1:])
        mask[:, 0] = 1
        if self.facts.condition == "first and last":
            mask[-1, -1] = 1
        return [mask, condition]

    def key_map(self) -> KeyMap:
        return keys.wan_key_map()

    def export_files(self) -> Mapping[str, ExportFile]:
        if not self.routing:
            return super().export_files()
        return {
            f"_{expert}_noise": ExportFile(prefix, self._metadata(expert, self.routing.of(expert)))
            for expert, prefix in PREFIXES.items()
        }

    def export_file_of(self, path: Path, metadata: Mapping[str, str]) -> str:
        """Which expert a LoRA is for, by the file's name or by what it says of itself."""
        if not self.routing:
            return super().export_file_of(path, metadata)
        experts = {expert_named(path), expert_in(metadata.get("modelspec.architecture", ""))} - {None}
        if len(experts) != 1:
            what = "its name and its metadata tell different ones" if experts else "neither its name nor its metadata tells"
            raise UserError(
                f"{path}: it is not known which of the two transformers of {self.facts.title} this LoRA is for ({what}); "
                "name the file …_high_noise.safetensors or …_low_noise.safetensors"
            )
        return f"_{experts.pop()}_noise"

    def export_metadata(self) -> dict[str, str]:
        return self._metadata(None if self.routing else self.expert, self.timesteps)

    def _metadata(self, expert: Expert | None, timesteps: TimestepDistribution) -> dict[str, str]:
        width = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        size = SIZES.get((self.config["num_layers"], width), "14b")
        metadata = {
            "modelspec.architecture": f"{self.facts.release}-{self.facts.kind}-{size}",
            "modelspec.implementation": f"https://github.com/Wan-Video/{self.facts.release.capitalize()}",
        }
        if expert:
            metadata["modelspec.architecture"] += f"-{expert}-noise"
            low, high = (round(MODEL_TIMESTEPS * t) for t in (timesteps.low, timesteps.high))
            metadata["modelspec.timestep_range"] = f"{low},{high}"
        return metadata

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)
