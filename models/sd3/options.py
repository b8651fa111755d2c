"""``[model]`` for SD3."""

from typing import Annotated

from pydantic import Field

from utils.config.schema import FilePath, ModelOptions

Rate = Annotated[float, Field(ge=0, le=1)]


class Sd3Options(ModelOptions):
    """``[model]`` for SD3."""

    text_encoder_2_path: FilePath | None = None
    """CLIP-G alone (`clip_g.safetensors`, or a folder). `text_encoder_path` is CLIP-L."""
    text_encoder_3_path: FilePath | None = None
    """T5-XXL alone (`t5xxl_fp16.safetensors`, or a folder)."""
    tokenizer_3_path: FilePath | None = None
    """T5's tokenizer folder, for files that carry no tokenizer. `tokenizer_path` is that of both CLIPs."""
    t5: bool = True
    """`false` trains without T5: its states are zeros, as diffusers has them at inference without it."""
    t5_max_tokens: Annotated[int, Field(ge=1, le=512)] = 256
    """Length that T5's captions are cut and padded to. Inference in diffusers uses 256; SD3 Medium was trained with 77."""
    clip_l_dropout: Rate = 0.0
    """How often CLIP-L's states and pooled state are zeros, for each sample by itself. SD3's paper has 0.46 for each encoder."""
    clip_g_dropout: Rate = 0.0
    """The same for CLIP-G."""
    t5_dropout: Rate = 0.0
    """The same for T5's states."""
