"""Wan's forward as pipeline layers over diffusers' blocks.

The stream, with B the micro-batch, D the inner width, L the video tokens and F, H, W the latent's size:

| name | shape | between |
| --- | --- | --- |
| x | [B, C_in, F, H, W] | input to embed: noisy latents, for image to video with mask and condition channels |
| t | [B] or [B, 2] fp32 | input to embed: 1000 times the timestep; of a clean first latent frame and of the others |
| text | [B, 512, text_dim] | input to embed: encoder states, zero-padded |
| clip | [B, n, 1280] | input to embed, Wan 2.1 image to video: image encoder states of one frame (n = 257) or two (n = 514) |
| hidden | [B, L, D] | embed to head |
| context | [B, 512 (+ n), D] | embed to last block: image tokens first, then text |
| modulation | [B, 6, D] or [B, 2, 6, D] | embed to last block |
| time | [B, D] or [B, 2, D] | embed to head |
| grid | [3] int64 | embed to head: F, H, W in patches |
| prediction | [B, C_out, F, H, W] | output of head |
"""

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from torch import Tensor

from utils.pipeline.layer import PipelineLayer, Stream


class RotaryTable:
    """Rotary position embeddings by grid, computed once per grid and device.  Owns no weights and is no module of a layer.

    The model's own is on the meta device when the layers are made, so it is made anew from the config.
    """

    def __init__(self, transformer: WanTransformer3DModel):
        config = transformer.config
        self._arguments = (config.attention_head_dim, (1, 1, 1), config.rope_max_seq_len)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._embedding: WanRotaryPosEmbed | None = None

    def at(self, grid: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [1, L, 1, head_dim] fp32."""
        key = (*grid.tolist(), device)
        if key not in self._tables:
            if self._embedding is None:
                with torch.device("cpu"):
                    self._embedding = WanRotaryPosEmbed(*self._arguments)
            # Only the shape of the argument is read.
            shape_only = torch.empty((), device="cpu").expand(1, 1, *grid.tolist())
            self._tables[key] = tuple(table.to(device) for table in self._embedding(shape_only))
        return self._tables[key]


def by_token(values: Tensor, grid: Tensor) -> Tensor:
    """What belongs to the first latent frame and to the others, [B, 2, ...], for each token: [B, L, ...].

    So that only two of them cross a stage boundary, and not one for each token.
    """
    frames, height, width = grid.tolist()
    rest = [-1] * (values.ndim - 2)
    counts = (height * width, (frames - 1) * height * width)
    return torch.cat([values[:, index : index + 1].expand(-1, count, *rest) for index, count in enumerate(counts)], dim=1)


class EmbedLayer(PipelineLayer):
    """Patches, time, text and image to the stream that the blocks read."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self.patch_embedding = transformer.patch_embedding
        self.condition_embedder = transformer.condition_embedder
        self.patch_size = transformer.config.patch_size

    def run(self, stream: Stream) -> Stream:
        x = stream["x"]
        weight_dtype = self.condition_embedder.text_embedder.linear_1.weight.dtype
        # As at inference, without autocast: the time's sinusoid and its embedder stay in fp32 (bf16 would quantise the time).
        with torch.autocast(x.device.type, enabled=False):
            time, projection, context, image = self.condition_embedder(
                stream["t"].flatten(),
                stream["text"].to(weight_dtype),
                self._images(stream["clip"]).to(weight_dtype) if "clip" in stream else None,
                timestep_seq_len=stream["t"].shape[1] if stream["t"].ndim == 2 else None,
            )
            hidden = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        if image is not None:
            context = torch.concat([image, context], dim=1)
        grid = [size // patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        return Stream(
            hidden=hidden.flatten(2).transpose(1, 2),
            context=context,
            modulation=projection.unflatten(-1, (6, -1)),
            time=time,
            grid=torch.tensor(grid, dtype=torch.int64, device="cpu"),
        )

    def _images(self, states: Tensor) -> Tensor:
        """With position embeddings diffusers wants the first and the last frame one after the other in the batch."""
        if self.condition_embedder.image_embedder.pos_embed is None:
            return states
        return states.unflatten(1, (2, -1)).flatten(0, 1)


class BlockLayer(PipelineLayer):
    """One transformer block."""

    def __init__(self, block: torch.nn.Module, rotary: RotaryTable, is_last: bool):
        super().__init__()
        self.block = block
        self._rotary = [rotary]
        # After the last block nothing reads these any more.
        self._drop = ("context", "modulation") if is_last else ()

    def run(self, stream: Stream) -> Stream:
        hidden = stream["hidden"]
        rotary = self._rotary[0].at(stream["grid"], hidden.device)
        modulation = stream["modulation"]
        if modulation.ndim == 4:
            # In fp32, as the block reads it: expanded first, it would be held twice.
            modulation = by_token(modulation.float(), stream["grid"])
        hidden = self.block(hidden, stream["context"], modulation, rotary)
        return stream.replaced(drop=self._drop, hidden=hidden)


class HeadLayer(PipelineLayer):
    """Final modulation, projection and the way back from patches to latents."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self.scale_shift_table = transformer.scale_shift_table
        self.patch_size = transformer.config.patch_size

    def run(self, stream: Stream) -> Stream:
        hidden, time = stream["hidden"], stream["time"]
        table = self.scale_shift_table + time.unsqueeze(-2)
        shift, scale = table.chunk(2, dim=-2)
        if time.ndim == 3:
            shift, scale = (by_token(part.squeeze(2), stream["grid"]) for part in (shift, scale))
        hidden = self.proj_out((self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
        # [B, F H W, pt ph pw C] -> [B, C, F pt, H ph, W pw]
        hidden = hidden.unflatten(2, (*self.patch_size, -1)).unflatten(1, stream["grid"].tolist())
        hidden = hidden.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return Stream(prediction=hidden.flatten(6, 7).flatten(4, 5).flatten(2, 3))


def wan_layers(transformer: WanTransformer3DModel, rotary: RotaryTable | None = None) -> list[PipelineLayer]:
    """Embed, one layer per block, head.  ``rotary``: of another model of the same config, to be shared."""
    rotary = rotary or RotaryTable(transformer)
    last = len(transformer.blocks) - 1
    blocks = [BlockLayer(block, rotary, is_last=index == last) for index, block in enumerate(transformer.blocks)]
    return [EmbedLayer(transformer), *blocks, HeadLayer(transformer)]
