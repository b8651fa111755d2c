"""FLUX.1's forward as pipeline layers over diffusers' blocks.

The stream, with B the micro-batch, D the inner width, h and w the latent's size, R references, Lt text tokens, and the picture
tokens Li = (R + 1) h/2 w/2, the target's first:

| name | shape | between |
| --- | --- | --- |
| x | [B, 16, h, w] | input to embed: noisy latents |
| references | [B, R, 16, h, w] | input to embed, Kontext: clean latents |
| t | [B] fp32 | input to embed: the timestep in [0, 1] |
| guidance | [B] fp32 | input to embed, all but schnell |
| text | [B, Lt, 4096] | input to embed: T5 states, padding among them |
| pooled | [B, 768] | input to embed: CLIP's pooled output |
| hidden | [B, Li, D] | embed to head |
| context | [B, Lt, D] | embed to last block |
| time | [B, D] | embed to head: time, guidance and pooled text |
| grid | [3] int64 | embed to head: rows and columns of a picture's tokens, number of references |
| prediction | [B, 16, h, w] | output of head |
"""

import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformer2DModel
from torch import Tensor

from models.common.tokens import pack, unpack
from utils.pipeline.layer import PipelineLayer, Stream

TIME_SCALE = 1000
"""Timesteps and guidance are multiplied by it before their sinusoids."""
ROPE_THETA = 10000


def token_ids(text_tokens: int, rows: int, columns: int, references: int) -> Tensor:
    """Position (index, row, column) of each token, [Lt + Li, 3] fp32: text (0, 0, 0), picture (0, r, c), references (1, r, c).

    The first reference is where diffusers' FluxKontextPipeline puts it.  Further ones are where ComfyUI puts them (``offset`` in
    its ``comfy/ldm/flux/model.py``): each below the earlier ones, or beside them where that makes a smaller side.
    """
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    ids = [torch.zeros(text_tokens, 3), grid]
    height = width = 0
    for _ in range(references):
        top, left = (0, width) if rows + height > columns + width else (height, 0)
        ids.append(grid + torch.tensor([1, top, left]))
        height, width = max(height, rows + top), max(width, columns + left)
    return torch.cat(ids)


class RotaryTable:
    """Rotary position embeddings by geometry, computed once for each and device.  Owns no weights and is no module of a layer."""

    def __init__(self, transformer: FluxTransformer2DModel):
        self._embedding = FluxPosEmbed(theta=ROPE_THETA, axes_dim=transformer.config.axes_dims_rope)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def at(self, text_tokens: int, grid: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [Lt + Li, head_dim] fp32, text first."""
        key = (text_tokens, *grid.tolist(), device)
        if key not in self._tables:
            with torch.device("cpu"):
                self._tables[key] = tuple(table.to(device) for table in self._embedding(token_ids(*key[:-1])))
        return self._tables[key]


class EmbedLayer(PipelineLayer):
    """Latents, time, guidance and text to the stream that the blocks read."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.x_embedder = transformer.x_embedder
        self.context_embedder = transformer.context_embedder
        self.time_text_embed = transformer.time_text_embed

    def run(self, stream: Stream) -> Stream:
        latents, dtype = stream["x"], self.x_embedder.weight.dtype
        pictures = [latents, *stream["references"].unbind(1)] if "references" in stream else [latents]
        times = [TIME_SCALE * stream[name] for name in ("t", "guidance") if name in stream]
        # Without autocast: the time stays in fp32 up to its sinusoid (bf16 would quantise it), all else is in the weights' dtype.
        with torch.autocast(latents.device.type, enabled=False):
            hidden = self.x_embedder(torch.cat([pack(picture) for picture in pictures], dim=1).to(dtype))
            time = self.time_text_embed(*times, stream["pooled"].to(dtype))
            context = self.context_embedder(stream["text"].to(dtype))
        grid = [latents.shape[2] // 2, latents.shape[3] // 2, len(pictures) - 1]
        return Stream(hidden=hidden, context=context, time=time, grid=torch.tensor(grid, dtype=torch.int64, device="cpu"))


class BlockLayer(PipelineLayer):
    """One block of two streams, or one of a single stream: both have the same signature, and join and part text and picture."""

    def __init__(self, block: torch.nn.Module, rotary: RotaryTable, is_last: bool):
        super().__init__()
        self.block = block
        self._rotary = [rotary]
        # After the last block nothing reads the text any more.
        self._drop = ("context",) if is_last else ()

    def run(self, stream: Stream) -> Stream:
        hidden, context = stream["hidden"], stream["context"]
        context, hidden = self.block(
            hidden_states=hidden,
            encoder_hidden_states=context,
            temb=stream["time"],
            image_rotary_emb=self._rotary[0].at(context.shape[1], stream["grid"], hidden.device),
        )
        return stream.replaced(drop=self._drop, hidden=hidden, context=context)


class HeadLayer(PipelineLayer):
    """Final modulation, projection, and the way back from the target's tokens to latents."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out

    def run(self, stream: Stream) -> Stream:
        rows, columns, _ = stream["grid"].tolist()
        tokens = self.proj_out(self.norm_out(stream["hidden"], stream["time"]))
        return Stream(prediction=unpack(tokens[:, : rows * columns], rows, columns))


def flux_layers(transformer: FluxTransformer2DModel) -> list[PipelineLayer]:
    """Embed, one layer per block of either kind, head."""
    rotary = RotaryTable(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    layers = [BlockLayer(block, rotary, is_last=block is blocks[-1]) for block in blocks]
    return [EmbedLayer(transformer), *layers, HeadLayer(transformer)]
