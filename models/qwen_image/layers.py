"""Qwen-Image's forward as pipeline layers over diffusers' blocks.

The stream, with B the micro-batch, D the inner width, L the picture tokens (the target's, then the references'), T the text tokens
of the longest caption, and h, w the target's size in tokens:

| name | shape | between |
| --- | --- | --- |
| x | [B, L, 64] | input to embed: packed noisy latents, then the packed references |
| t | [B] fp32 | input to embed: the timestep in [0, 1] |
| text | [B, T, 3584] | input to embed: encoder states, zero-padded |
| text_mask | [B, T] bool | input to last block, only if a caption is padded: where there is text |
| grids | [1 + references, 3] int64 | input to head: frames (1), rows and columns of tokens, the target first |
| hidden | [B, L, D] | embed to head |
| context | [B, T, D] | embed to last block |
| time | [B, D] | embed to head; with ``zero_cond_t`` [2 B, D], the second half for time 0 |
| prediction | [B, 16, 1, 2 h, 2 w] | output of head: the target's velocity |
"""

from functools import lru_cache

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformer2DModel
from torch import Tensor, nn

from models.common.tokens import unpack
from utils.pipeline.layer import PipelineLayer, Stream

Grids = tuple[tuple[int, int, int], ...]


class Positions:
    """What follows from the token grids alone, computed once for each.  Owns no weights and is no module of a layer.

    The model's own position embedding is on the meta device when the layers are made, so it is made anew from the config.
    """

    def __init__(self, transformer: QwenImageTransformer2DModel):
        self._axes = list(transformer.config.axes_dims_rope)
        self._embedding: QwenEmbedRope | None = None
        # Few: captions have many lengths, and a table is made of parts that the embedding keeps.
        self.rotary = lru_cache(maxsize=8)(self._rotary)
        self.is_reference = lru_cache(maxsize=8)(self._is_reference)

    def _rotary(self, grids: Grids, text_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Complex rotations of the picture tokens [L, head_dim / 2] and of the text tokens [T, head_dim / 2]."""
        if self._embedding is None:
            with torch.device("cpu"):
                self._embedding = QwenEmbedRope(theta=10000, axes_dim=self._axes, scale_rope=True)
        return self._embedding([list(grids)], max_txt_seq_len=text_tokens, device=device)

    def _is_reference(self, grids: Grids, device: torch.device) -> Tensor:
        """[1, L] int32: 0 for tokens of the target, 1 for those of references."""
        lengths = [frames * rows * columns for frames, rows, columns in grids]
        values = torch.zeros(1, sum(lengths), dtype=torch.int32)
        values[:, lengths[0] :] = 1
        return values.to(device)


def _as_tuples(grids: Tensor) -> Grids:
    return tuple(map(tuple, grids.tolist()))


class EmbedLayer(PipelineLayer):
    """Picture tokens, text and time to the stream that the blocks read."""

    def __init__(self, transformer: QwenImageTransformer2DModel):
        super().__init__()
        self.img_in = transformer.img_in
        self.txt_norm = transformer.txt_norm
        self.txt_in = transformer.txt_in
        self.time_text_embed = transformer.time_text_embed
        self.zero_cond_t = transformer.config.zero_cond_t

    def run(self, stream: Stream) -> Stream:
        weight_dtype, t = self.img_in.weight.dtype, stream["t"]
        # Without autocast, as at inference.  The time stays in fp32 until after its sinusoid (bf16 would quantise it).
        with torch.autocast(t.device.type, enabled=False):
            hidden = self.img_in(stream["x"].to(weight_dtype))
            context = self.txt_in(self.txt_norm(stream["text"].to(weight_dtype)))
            time = self.time_text_embed(torch.cat([t, torch.zeros_like(t)]) if self.zero_cond_t else t, hidden)
        return stream.replaced(drop=("x", "t", "text"), hidden=hidden, context=context, time=time)


class BlockLayer(PipelineLayer):
    """One transformer block."""

    def __init__(self, block: nn.Module, positions: Positions, is_last: bool):
        super().__init__()
        self.block = block
        self._positions = [positions]
        # After the last block nothing reads these any more: its text MLP and text output never get a gradient.
        self._drop = ("context", "text_mask") if is_last else ()

    def run(self, stream: Stream) -> Stream:
        hidden, context = stream["hidden"], stream["context"]
        grids, positions = _as_tuples(stream["grids"]), self._positions[0]
        context, hidden = self.block(
            hidden_states=hidden,
            encoder_hidden_states=context,
            encoder_hidden_states_mask=stream.get("text_mask"),
            temb=stream["time"],
            image_rotary_emb=positions.rotary(grids, context.shape[1], hidden.device),
            modulate_index=positions.is_reference(grids, hidden.device) if self.block.zero_cond_t else None,
        )
        return stream.replaced(drop=self._drop, hidden=hidden, context=context)


class HeadLayer(PipelineLayer):
    """Final modulation, projection, and the target's tokens back to latents."""

    def __init__(self, transformer: QwenImageTransformer2DModel):
        super().__init__()
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self.zero_cond_t = transformer.config.zero_cond_t

    def run(self, stream: Stream) -> Stream:
        time = stream["time"].chunk(2)[0] if self.zero_cond_t else stream["time"]
        tokens = self.proj_out(self.norm_out(stream["hidden"], time))
        _, rows, columns = stream["grids"][0].tolist()
        return Stream(prediction=unpack(tokens[:, : rows * columns], rows, columns).unsqueeze(2))


def qwen_layers(transformer: QwenImageTransformer2DModel) -> list[PipelineLayer]:
    """Embed, one layer per block, head."""
    positions = Positions(transformer)
    last = len(transformer.transformer_blocks) - 1
    blocks = [BlockLayer(block, positions, is_last=index == last) for index, block in enumerate(transformer.transformer_blocks)]
    return [EmbedLayer(transformer), *blocks, HeadLayer(transformer)]
