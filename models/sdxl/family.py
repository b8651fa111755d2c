"""Stable Diffusion XL: the family's contract."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from models.base import Layout, ModelFamily
from models.sdxl import encoders, files, keys, text_encoders, tiny
from models.sdxl.checkpoint import FILE_FACTS, companions
from models.sdxl.layers import sdxl_layers
from models.sdxl.options import Prediction, SdxlOptions
from utils.config.schema import ModelOptions
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, MicroBatch, SizeRules
from utils.diffusion.losses import debiased_weight, min_snr_weight
from utils.diffusion.schedules import DiscreteSchedule
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_files import AdapterFile
from utils.formats.adapter_format import LoraFormat
from utils.formats.recognise import FileFacts
from utils.pipeline.layer import PipelineLayer
from utils.runtime import DTYPES
from utils.weights.keymap import KeyMap
from utils.weights.named import NamedWeights

log = logging.getLogger(__name__)

KOHYA = {"down": "lora_down", "up": "lora_up", "separator": "_", "writes_alpha": True}
"""How kohya's trainer spells the keys of a LoRA."""
BETA_START, BETA_END = 0.00085, 0.012
"""Of the released schedule (``sd_xl_base.yaml``: LegacyDDPMDiscretization)."""


class Family(ModelFamily):
    """Stable Diffusion XL."""

    Options: ClassVar[type[ModelOptions]] = SdxlOptions
    variants: ClassVar[tuple[str, ...]] = tiny.VARIANTS
    parts: ClassVar[Mapping[str, str]] = {
        "unet": r"(?!text_encoder).+",
        "text_encoder_1": r"text_encoder",
        "text_encoder_2": r"text_encoder_2",
    }
    # Every Linear around and in the attention, and of the blocks of text encoders that are trained; not the convolutions, which
    # target_modules can name.
    adapter_targets: ClassVar[str] = (
        r".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
        r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))"
        r"|text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
    )
    # kohya's names with the release's block numbers, which is what all programs write and read for SDXL.
    lora_format: ClassVar[LoraFormat] = LoraFormat(
        prefix="lora_unet_",
        names="released",
        **KOHYA,
        others={
            "text_encoder.": LoraFormat(prefix="lora_te1_", names="diffusers", **KOHYA),
            "text_encoder_2.": LoraFormat(prefix="lora_te2_", names="diffusers", **KOHYA),
        },
    )
    file_facts: ClassVar[FileFacts] = FILE_FACTS

    def __init__(self, options: SdxlOptions):
        self.options = options
        self.files = files.find_files(options)
        self.config = self.files.transformer.config
        self.variant = "sdxl"
        self.size_rules = SizeRules(multiple=32, frame_step=None, fps=None, token_side=8)
        self.prediction, self.zero_terminal_snr = _training(options, self.files)
        log.info("SDXL: prediction %s%s", self.prediction, ", zero terminal SNR" if self.zero_terminal_snr else "")
        for number, name in enumerate(text_encoders.TEXT_ENCODERS, start=1):
            if name not in text_encoders.trained_text_encoders(options):
                log.info("SDXL: text encoder %d is frozen; model.text_encoder_%d_lr trains it", number, number)
        schedule = DiscreteSchedule.scaled_linear(BETA_START, BETA_END)
        self.schedule = schedule.with_zero_terminal_snr() if self.zero_terminal_snr else schedule
        self.timesteps = self.timestep_distribution(shift=1.0)
        self.weigh = _weighting(options, self.prediction)
        for name in text_encoders.TEXT_ENCODERS:
            text_encoders.blocks_used(getattr(self.files, name), options)

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.sdxl_encoders(self.files, self.options)

    def build_transformer(self) -> nn.Module:
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        transformer = UNet2DConditionModel.from_config(self.config)
        text_encoders.join_text_encoders(transformer, self.files, self.options)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        return transformer

    def weights(self) -> NamedWeights:
        return text_encoders.trained_weights(self.files, self.options)

    def adaptable_weights(self) -> NamedWeights:
        return text_encoders.all_weights(self.files)

    def take_merged(self, weights: NamedWeights, merged: Sequence[tuple[AdapterFile, float]]) -> None:
        self.files = text_encoders.with_merged(self.files, weights, merged)

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return [*text_encoders.text_encoder_layers(transformer, self.files, self.options), *sdxl_layers(transformer)]

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the first layer (see ``layers.py``, and ``text_encoders.py`` if they are trained) and the target.

        The target is ``velocity`` [B, 4, h, w] fp32, and ``weights`` [B] if the options ask for them.  For epsilon the noise stands
        in the place of the velocity.
        """
        inputs: dict[str, list[Tensor]] = {"x": [], "t": [], "time_ids": []}
        targets, weights = [], []
        for index, key in enumerate(batch.keys):
            sample = {name: values[index] for name, values in batch.fields.items()}
            latents = sample["latents"][:, 0]
            step = self.schedule.step(self.timesteps.at(draw.quantile(key, "timestep")))
            noise = self._noise(draw, key, latents)
            path = self.schedule.path(latents, noise, step)
            targets.append(noise if self.prediction == "epsilon" else path.velocity)
            weights.append(self.weigh(self.schedule.snr(step)) if self.weigh else 1.0)
            inputs["x"].append(path.noisy)
            inputs["t"].append(torch.tensor(step))
            inputs["time_ids"].append(sample["time_ids"])
        return MicroBatch(
            inputs={name: torch.stack(values) for name, values in inputs.items()} | text_encoders.text_inputs(batch.fields),
            target={"velocity": torch.stack(targets), **({"weights": torch.tensor(weights)} if self.weigh else {})},
        )

    def _noise(self, draw: Draw, key: str, latents: Tensor) -> Tensor:
        """[4, h, w]: normal; with ``noise_offset`` each channel is moved as one (Guttenberg 2023, "Offset Noise")."""
        noise = draw.normal(key, "noise", tuple(latents.shape))
        offset = self.options.noise_offset
        return noise + offset * draw.normal(key, "noise_offset", (len(latents), 1, 1)) if offset else noise

    def key_map(self) -> KeyMap:
        return keys.model_key_map()

    def full_key_map(self) -> KeyMap:
        return keys.model_key_map(keys.UNET_PREFIX)

    @classmethod
    def part_lr(cls, options: SdxlOptions) -> Mapping[str, float]:
        rates = {"unet": options.unet_lr, "text_encoder_1": options.text_encoder_1_lr, "text_encoder_2": options.text_encoder_2_lr}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def companions(self) -> Mapping[str, Tensor]:
        """The other three networks, as the release's one file has them, and the markers of velocity prediction."""
        return companions(self.files, v_prediction=self.prediction == "v_prediction", zero_snr=self.zero_terminal_snr)

    def export_metadata(self) -> dict[str, str]:
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.prediction_type": "epsilon" if self.prediction == "epsilon" else "v",
            "modelspec.encoder_layer": str(2 + self.options.clip_skip),
            "ss_base_model_version": "sdxl_base_v1-0",
        }

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)


def _training(options: SdxlOptions, found: files.SdxlFiles) -> tuple[Prediction, bool]:
    """What is predicted, and whether the schedule ends in pure noise: as asked for, else as the files say."""
    prediction = options.prediction or found.prediction or "epsilon"
    by_files = found.zero_terminal_snr if prediction == found.prediction else None
    zero_snr = next(value for value in (options.zero_terminal_snr, by_files, prediction == "v_prediction") if value is not None)
    if zero_snr and prediction == "epsilon":
        raise UserError(
            "zero terminal SNR with a model that predicts the noise: in pure noise there is nothing to predict it from; "
            'set model.zero_terminal_snr = false, or model.prediction = "v_prediction"'
        )
    if found.prediction not in (None, prediction):
        log.warning("model.prediction = %r, while the model's files say that it predicts %r", prediction, found.prediction)
    return prediction, zero_snr


def _weighting(options: SdxlOptions, prediction: Prediction) -> Callable[[float], float] | None:
    """Weight of a sample's loss by the SNR; None if all weigh the same."""
    if options.min_snr_gamma is not None:
        return partial(min_snr_weight, gamma=options.min_snr_gamma, prediction=prediction)
    return partial(debiased_weight, prediction=prediction) if options.debiased_estimation_loss else None
