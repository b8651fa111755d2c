"""``[model]`` for SDXL."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from utils.config.schema import FilePath, ModelOptions

Prediction = Literal["epsilon", "v_prediction"]
LearningRate = Annotated[float, Field(ge=0)]


class SdxlOptions(ModelOptions):
    """``[model]`` for SDXL."""

    path: FilePath | None = None
    """The model's one checkpoint file, a diffusers folder, or a folder of ComfyUI files."""
    text_encoder_2_path: FilePath | None = None
    """CLIP-G alone (`clip_g.safetensors`, or a folder). `text_encoder_path` is CLIP-L."""
    unet_lr: LearningRate | None = None
    """Learning rate of the UNet; 0: it is frozen. Default: `[optimizer] lr`."""
    text_encoder_1_lr: LearningRate | None = None
    """Learning rate of CLIP-L. With a rate above 0 it is trained; without one, or with 0, it is frozen and its output cached."""
    text_encoder_2_lr: LearningRate | None = None
    """Learning rate of CLIP-G, in the same way."""
    timestep_sample_method: Literal["logit_normal", "uniform", "mode", "cosmap"] = "uniform"
    """How timesteps are drawn; SDXL was trained with `uniform`."""
    prediction: Prediction | None = None
    """What the model predicts: the noise or the velocity. Default: what its files say, else `epsilon`."""
    zero_terminal_snr: bool | None = None
    """The last step of the schedule is pure noise. Default: what the model's files say, else `true` for `v_prediction` only."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Weights the loss by min(SNR, gamma) (Min-SNR; the paper has 5), so that steps of little noise count less."""
    debiased_estimation_loss: bool = False
    """Weights the loss by 1 / sqrt(SNR) (debiased estimation), so that steps of much noise count more."""
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """Strength of noise that is the same in a whole channel: very dark and very bright pictures are learned (0.03 to 0.1)."""
    clip_skip: Annotated[int, Field(ge=0, le=10)] = 0
    """Layers of both text encoders that are left out, beside the last one, which SDXL never uses; 0 is what it was trained with."""
    max_prompt_chunks: Annotated[int, Field(ge=1, le=4)] = 3
    """Captions are read in chunks of 75 tokens, as many as they need, and cut after so many."""

    @field_validator("zero_terminal_snr")
    @classmethod
    def _noise_can_be_told(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("prediction") == "epsilon":
            raise ValueError('it needs prediction = "v_prediction": in pure noise there is nothing to predict the noise from')
        return value

    @field_validator("debiased_estimation_loss")
    @classmethod
    def _one_weighting(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("min_snr_gamma") is not None:
            raise ValueError("the loss is weighted by min_snr_gamma already; remove one of them")
        return value
