"""``[model]`` for Wan."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from models.wan.variants import Trained
from utils.config.schema import FilePath, ModelOptions

DEFAULT_SHIFT = 3.0


class WanOptions(ModelOptions):
    """``[model]`` for Wan."""

    shift: Annotated[float, Field(gt=0)] | None = DEFAULT_SHIFT
    """Constant timestep shift s: t' = s t / (1 + (s - 1) t). Inference at 480p uses 3, at 720p 5."""
    min_t: Annotated[float, Field(ge=0, le=1)] | None = None
    """Lower end of the timesteps that are trained. The distribution is cut there, not squeezed. Default: 0; for the high-noise
    expert of Wan 2.2 A14B alone where its share begins, 0.875 (T2V) or 0.9 (I2V)."""
    max_t: Annotated[float, Field(ge=0, le=1)] | None = None
    """Upper end of the timesteps that are trained. Default: 1; for the low-noise expert of Wan 2.2 A14B alone where its share
    ends."""
    expert: Trained | None = None
    """Which transformers of Wan 2.2 A14B are trained: the one for `high` noise, the one for `low` noise, or `both` in one run,
    where each micro-batch goes to the one that its timesteps belong to. Default: of a folder, those that are in it; else the one
    that `transformer_path` names."""
    transformer_2_path: FilePath | None = None
    """Wan 2.2 A14B: the transformer for low noise alone, a `.safetensors` file or a folder, beside `transformer_path` for the one
    for high noise."""
    first_frame: bool = False
    """Wan 2.2 TI2V-5B only: show the first frame of each clip, so that image to video is trained; its latents are clean, have the
    time 0 and do not count in the loss. Pictures are trained as without it."""

    @field_validator("max_t")
    @classmethod
    def _range_is_not_empty(cls, value: float | None, info: ValidationInfo) -> float | None:
        lower = info.data.get("min_t")
        if value is not None and lower is not None and value <= lower:
            raise ValueError(f"it must be above min_t = {lower}")
        return value
