"""FLUX.2's forward as pipeline layers over diffusers' blocks.

The stream, with B the micro-batch, D the inner width, h and w the target's size in tokens, n the reference pictures, T the text's
tokens and L the picture tokens, those of the references after the target's:

| name | shape | between |
| --- | --- | --- |
| x | [B, C, 1, h, w] | input to embed: noisy latents |
| references | [B, n, C, h', w'] | input to embed, only with references: clean latents |
| t | [B] fp32 | input to embed: the timestep |
| guidance | [B] fp32 | input to embed, dev: the guidance that the model is told |
| text | [B, T, joint_attention_dim] | input to embed: the text encoder's states |
| hidden | [B, L, D], after the double blocks [B, T + L, D] | embed to head: pictures; text first once it is joined |
| context | [B, T, D] | embed to last double block |
| modulation_img, modulation_txt | [B, 6 D] | embed to last double block |
| modulation_single | [B, 3 D] | embed to last single block |
| time | [B, D] | embed to head |
| grid | [1 + n, 2] int64 | embed to head: height and width in tokens of the target and of each reference |
| prediction | [B, C, 1, h, w] | output of head |

All blocks share three modulation modules, so the embed layer owns them.
"""

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
)
from torch import Tensor, nn

from utils.pipeline.layer import PipelineLayer, Stream

TIME_SCALE = 1000
REFERENCE_STEP = 10
"""Distance of the reference pictures on the time axis of the positions: 10, 20, …; the target is at 0."""


def position_ids(text_tokens: int, grid: list[list[int]]) -> Tensor:
    """[T + L, 4] int64: (time, row, column, text position), text first, then the target, then the references."""
    zero = torch.zeros(1, dtype=torch.int64)
    ids = [torch.cartesian_prod(zero, zero, zero, torch.arange(text_tokens))]
    for index, (height, width) in enumerate(grid):
        time = torch.tensor([REFERENCE_STEP * index])
        ids.append(torch.cartesian_prod(time, torch.arange(height), torch.arange(width), zero))
    return torch.cat(ids)


class RotaryTable:
    """Rotary position embeddings by text length and grid, computed once each.  Owns no weights and is no module of a layer."""

    def __init__(self, transformer: Flux2Transformer2DModel):
        config = transformer.config
        self._embedding = Flux2PosEmbed(theta=config.rope_theta, axes_dim=config.axes_dims_rope)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def at(self, text_tokens: int, grid: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T + L, head_dim] fp32."""
        key = (text_tokens, tuple(grid.flatten().tolist()), device)
        if key not in self._tables:
            with torch.device("cpu"):
                self._tables[key] = tuple(table.to(device) for table in self._embedding(position_ids(text_tokens, grid.tolist())))
        return self._tables[key]


class EmbedLayer(PipelineLayer):
    """Tokens, time, guidance and text to the stream that the blocks read."""

    def __init__(self, transformer: Flux2Transformer2DModel):
        super().__init__()
        self.time_guidance_embed = transformer.time_guidance_embed
        self.double_stream_modulation_img = transformer.double_stream_modulation_img
        self.double_stream_modulation_txt = transformer.double_stream_modulation_txt
        self.single_stream_modulation = transformer.single_stream_modulation
        self.x_embedder = transformer.x_embedder
        self.context_embedder = transformer.context_embedder

    def run(self, stream: Stream) -> Stream:
        x, references = stream["x"], stream.get("references")
        # As at inference, without autocast: each part computes in its weights' dtype.
        with torch.autocast(x.device.type, enabled=False):
            time = self._time(stream["t"], stream.get("guidance"))
            hidden = _in_dtype_of(self.x_embedder, _tokens(x, references))
            return Stream(
                hidden=hidden,
                context=_in_dtype_of(self.context_embedder, stream["text"]),
                modulation_img=self.double_stream_modulation_img(time),
                modulation_txt=self.double_stream_modulation_txt(time),
                modulation_single=self.single_stream_modulation(time),
                time=time,
                grid=_grid(x, references),
            )

    def _time(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        """[B, D].  The sinusoids see fp32, unlike in diffusers' forward: bf16 would put the time on a grid of 1/256."""
        embed = self.time_guidance_embed
        time = _in_dtype_of(embed.timestep_embedder, embed.time_proj(TIME_SCALE * t), embed.timestep_embedder.linear_1)
        if guidance is None:
            return time
        told = embed.time_proj(TIME_SCALE * guidance)
        return time + _in_dtype_of(embed.guidance_embedder, told, embed.guidance_embedder.linear_1)


def _in_dtype_of(module: nn.Module, value: Tensor, linear: nn.Module | None = None) -> Tensor:
    """What the module makes of a value, cast to the dtype of its weight (of its first ``linear``)."""
    return module(value.to((linear or module).weight.dtype))


def _tokens(x: Tensor, references: Tensor | None) -> Tensor:
    """[B, L, C], rows of the target's latents first, then those of each reference."""
    target = x.flatten(2).transpose(1, 2)
    if references is None:
        return target
    return torch.cat([target, references.flatten(3).transpose(2, 3).flatten(1, 2)], dim=1)


def _grid(x: Tensor, references: Tensor | None) -> Tensor:
    sizes = [list(x.shape[-2:])]
    if references is not None:
        sizes += [list(references.shape[-2:])] * references.shape[1]
    return torch.tensor(sizes, dtype=torch.int64, device="cpu")


class DoubleBlockLayer(PipelineLayer):
    """One block with weights of its own for pictures and for text.  The last one joins the two for the single blocks."""

    def __init__(self, block: Flux2TransformerBlock, rotary: RotaryTable, is_last: bool):
        super().__init__()
        self.block = block
        self.is_last = is_last
        self._rotary = [rotary]

    def run(self, stream: Stream) -> Stream:
        context, hidden = stream["context"], stream["hidden"]
        context, hidden = self.block(
            hidden_states=hidden,
            encoder_hidden_states=context,
            temb_mod_img=stream["modulation_img"],
            temb_mod_txt=stream["modulation_txt"],
            image_rotary_emb=self._rotary[0].at(context.shape[1], stream["grid"], hidden.device),
        )
        if not self.is_last:
            return stream.replaced(hidden=hidden, context=context)
        joined = torch.cat([context, hidden], dim=1)
        return stream.replaced(drop=("context", "modulation_img", "modulation_txt"), hidden=joined)


class SingleBlockLayer(PipelineLayer):
    """One block on text and picture tokens alike."""

    def __init__(self, block: Flux2SingleTransformerBlock, rotary: RotaryTable, is_last: bool):
        super().__init__()
        self.block = block
        self._rotary = [rotary]
        # After the last block nothing reads it any more.
        self._drop = ("modulation_single",) if is_last else ()

    def run(self, stream: Stream) -> Stream:
        hidden, grid = stream["hidden"], stream["grid"]
        hidden = self.block(
            hidden_states=hidden,
            encoder_hidden_states=None,
            temb_mod=stream["modulation_single"],
            image_rotary_emb=self._rotary[0].at(_text_tokens(hidden, grid), grid, hidden.device),
        )
        return stream.replaced(drop=self._drop, hidden=hidden)


class HeadLayer(PipelineLayer):
    """Final modulation and projection of the picture tokens; those of the target go back to their places."""

    def __init__(self, transformer: Flux2Transformer2DModel):
        super().__init__()
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out

    def run(self, stream: Stream) -> Stream:
        hidden, grid = stream["hidden"], stream["grid"]
        height, width = grid[0].tolist()
        tokens = self.proj_out(self.norm_out(hidden[:, _text_tokens(hidden, grid) :], stream["time"]))
        target = tokens[:, : height * width].transpose(1, 2)
        return Stream(prediction=target.unflatten(2, (1, height, width)))


def _text_tokens(joined: Tensor, grid: Tensor) -> int:
    return joined.shape[1] - int(grid.prod(dim=1).sum())


def flux2_layers(transformer: Flux2Transformer2DModel) -> list[PipelineLayer]:
    """Embed, one layer per block, head."""
    rotary = RotaryTable(transformer)
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    return [
        EmbedLayer(transformer),
        *(DoubleBlockLayer(block, rotary, is_last=index == len(doubles) - 1) for index, block in enumerate(doubles)),
        *(SingleBlockLayer(block, rotary, is_last=index == len(singles) - 1) for index, block in enumerate(singles)),
        HeadLayer(transformer),
    ]
