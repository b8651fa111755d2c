"""SD3's forward as pipeline layers over diffusers' blocks.

The stream, with B the micro-batch, D the inner width, L = H W / 4 the tokens of the picture, H and W the latent's size:

| name | shape | between |
| --- | --- | --- |
| x | [B, 16, H, W] | input to embed: noisy latents |
| t | [B] fp32 | input to embed: 1000 times the timestep |
| text | [B, 77 + T5's tokens, joint_attention_dim] | input to embed: CLIP-L and CLIP-G side by side, then T5 |
| pooled | [B, pooled_projection_dim] | input to embed: pooled CLIP-L, then CLIP-G |
| hidden | [B, L, D] | embed to head |
| context | [B, 77 + T5's tokens, D] | embed to last block |
| time | [B, D] | embed to head: time and pooled text |
| grid | [2] int64 | embed to head: H and W in patches |
| prediction | [B, 16, H, W] | output of head |
"""

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from utils.pipeline.layer import PipelineLayer, Stream


class EmbedLayer(PipelineLayer):
    """Patches with their positions, time, pooled text and text to the stream that the blocks read."""

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.pos_embed = transformer.pos_embed
        self.time_text_embed = transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.patch_size = transformer.config.patch_size

    def run(self, stream: Stream) -> Stream:
        x, dtype = stream["x"], self.pos_embed.proj.weight.dtype
        # As at inference, without autocast.  The time goes into its sinusoid in fp32: bf16 would quantise it.
        with torch.autocast(x.device.type, enabled=False):
            return Stream(
                hidden=self.pos_embed(x.to(dtype)),
                context=self.context_embedder(stream["text"].to(dtype)),
                time=self.time_text_embed(stream["t"], stream["pooled"].to(dtype)),
                grid=torch.tensor([size // self.patch_size for size in x.shape[-2:]], dtype=torch.int64, device="cpu"),
            )


class BlockLayer(PipelineLayer):
    """One transformer block; the last one reads the text and does not write it."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def run(self, stream: Stream) -> Stream:
        context, hidden = self.block(hidden_states=stream["hidden"], encoder_hidden_states=stream["context"], temb=stream["time"])
        if context is None:
            return stream.replaced(drop=("context",), hidden=hidden)
        return stream.replaced(hidden=hidden, context=context)


class HeadLayer(PipelineLayer):
    """Final modulation, projection and the way back from patches to latents."""

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self.patch_size = transformer.config.patch_size

    def run(self, stream: Stream) -> Stream:
        tokens = self.proj_out(self.norm_out(stream["hidden"], stream["time"]))
        # [B, h w, p q C] -> [B, C, h p, w q]
        patches = tokens.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, stream["grid"].tolist())
        return Stream(prediction=patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


def sd3_layers(transformer: SD3Transformer2DModel) -> list[PipelineLayer]:
    """Embed, one layer per block, head."""
    return [EmbedLayer(transformer), *map(BlockLayer, transformer.transformer_blocks), HeadLayer(transformer)]
