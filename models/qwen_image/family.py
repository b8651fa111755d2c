"""Qwen-Image and Qwen-Image-Edit: the family's contract."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from diffusers import QwenImageTransformer2DModel
from pydantic import Field
from torch import Tensor, nn

from models.base import Layout, ModelFamily
from models.common.tokens import SIDE, pack
from models.qwen_image import encoders, files, keys, tiny
from models.qwen_image.layers import qwen_layers
from models.qwen_image.networks import FILE_FACTS
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

SHIFT_POINTS = {"low": (256, 0.5), "high": (8192, 0.9)}
"""(tokens, mu) of the release's scheduler: the shift is exp(mu)."""


EDITING = f"train an editing model (model.variant = {files.EDIT!r}, {files.EDIT_PLUS!r} or {files.EDIT_2511!r})"
PLAIN = f"train Qwen-Image itself (model.variant = {files.IMAGE!r})"
SEVERAL = f"train a model that takes several (model.variant = {files.EDIT_PLUS!r} or {files.EDIT_2511!r}), or {PLAIN}"
CONTROLS = {
    files.IMAGE: ControlRules(0, 0, EDITING),
    files.EDIT: ControlRules(1, 1, SEVERAL),
    files.EDIT_PLUS: ControlRules(1, None, PLAIN),
    files.EDIT_2511: ControlRules(1, None, PLAIN),
}


class QwenImageOptions(ModelOptions):
    """``[model]`` for Qwen-Image."""

    variant: Literal["qwen-image", "qwen-image-edit", "qwen-image-edit-plus", "qwen-image-edit-2511"] | None = None
    """Which model it is: the tensors do not tell. Default: by `model_index.json`, or by the transformer's file name."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Constant timestep shift s: t' = s t / (1 + (s - 1) t). Default: grows with the picture as at inference, 2 at 1024x1024."""


class Family(ModelFamily):
    """Qwen-Image, Qwen-Image-Edit, Edit-Plus (2509) and Edit-2511."""

    Options: ClassVar[type[ModelOptions]] = QwenImageOptions
    variants: ClassVar[tuple[str, ...]] = files.VARIANTS
    parts: ClassVar[Mapping[str, str]] = {
        "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out|norm_[qk])",
        "feed_forward": r"transformer_blocks\.\d+\.img_mlp",
        "text_branch": r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])|txt_mlp)",
        "modulation": r"transformer_blocks\.\d+\.(img|txt)_mod",
        "embedders": r"img_in|txt_in|txt_norm|time_text_embed",
        "output": r"norm_out|proj_out",
    }
    # Every Linear of a block but the modulation; not the embedders and not the head.
    adapter_targets: ClassVar[str] = (
        r"transformer_blocks\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
    )
    # The names are those of diffusers; this prefix is the one that both it and ComfyUI take.
    lora_format: ClassVar[LoraFormat] = LoraFormat(prefix="diffusion_model.", names="released")
    file_facts: ClassVar[FileFacts] = FILE_FACTS

    def __init__(self, options: QwenImageOptions):
        self.options = options
        self.files = files.find_files(options, options.variant)
        self.config, self.variant = self.files.config, self.files.variant
        self.controls = CONTROLS[self.variant]
        # 32, not 16: for an odd number of tokens a side, diffusers and ComfyUI count the rows from different middles.
        self.size_rules = SizeRules(multiple=32, frame_step=None, fps=None)

    @property
    def edits(self) -> bool:
        return self.variant != files.IMAGE

    def encoders(self) -> list[ConditionEncoder]:
        return encoders.qwen_encoders(self.files, DTYPES[self.options.dtype])

    def build_transformer(self) -> nn.Module:
        dtype = DTYPES[self.options.transformer_dtype or self.options.dtype]
        transformer = QwenImageTransformer2DModel.from_config(self.config)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        return transformer

    def weights(self) -> WeightSource:
        return WeightSource(self.files.transformer, self.key_map())

    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        return qwen_layers(transformer)

    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Stream for the embed layer (see ``layers.py``) and ``velocity`` [B, 16, 1, H, W] fp32."""
        references = batch.fields["references"] if self.edits else []
        grids = _grids(batch.fields["latents"][0], references)
        _, _, height, width = batch.fields["latents"][0].shape
        timesteps = self.timestep_distribution(resolution_shift(height * width // SIDE**2, **SHIFT_POINTS))
        tokens, times, velocities = [], [], []
        for index, (key, latents) in enumerate(zip(batch.keys, batch.fields["latents"], strict=True)):
            t = timesteps.at(draw.quantile(key, "timestep"))
            path = flow_path(latents, draw.normal(key, "noise", tuple(latents.shape)), t)
            pictures = [path.noisy, *(references[index].float() if self.edits else ())]
            tokens.append(torch.cat([pack(picture[:, 0]) for picture in pictures]))
            times.append(torch.tensor(t, dtype=torch.float32))
            velocities.append(path.velocity)
        inputs = {
            "x": torch.stack(tokens),
            "t": torch.stack(times),
            **_padded(batch.fields["text"]),
            "grids": grids,
        }
        return MicroBatch(inputs=inputs, target={"velocity": torch.stack(velocities)})

    def key_map(self) -> KeyMap:
        return keys.qwen_key_map()

    def companions(self) -> Mapping[str, Tensor]:
        """The mark by which ComfyUI knows Edit-2511; it must be empty there."""
        return {keys.EDIT_2511_MARK: torch.zeros(0)} if self.variant == files.EDIT_2511 else {}

    def export_metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": self.variant, "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image"}

    @classmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        tiny.write_tiny(variant, folder, layout, seed, scale)


def _padded(texts: list[Tensor]) -> dict[str, Tensor]:
    """``text`` [B, T, D], with zeros after the shorter ones, and ``text_mask`` [B, T] if there are any."""
    longest = max(map(len, texts))
    padded = torch.stack([nn.functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
    mask = torch.stack([torch.arange(longest) < len(text) for text in texts])
    # Without padding there is no mask, as at inference: attention without one is faster.
    return {"text": padded} if mask.all() else {"text": padded, "text_mask": mask}


def _grids(latents: Tensor, references: list[Tensor]) -> Tensor:
    """[1 + n, 3] int64: frames, rows and columns of tokens of the target and of each reference."""
    numbers = {len(pictures) for pictures in references}
    if len(numbers) > 1:
        raise UserError(
            f"samples with {' and '.join(map(str, sorted(numbers)))} control pictures came into one micro-batch; "
            "set micro_batch_size_per_gpu = 1, or give all samples the same number"
        )
    pictures = [latents, *(references[0] if references else ())]
    return torch.tensor([[1, *(size // SIDE for size in picture.shape[2:])] for picture in pictures], dtype=torch.int64)
