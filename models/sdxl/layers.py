"""SDXL's UNet as pipeline layers over diffusers' blocks: the way down and the way up in one row, with the skips in the stream.

The stream, with B the micro-batch, C the channels and h, w the size at each level, D the width of the text, n the chunks of text:

| name | shape | between |
| --- | --- | --- |
| x | [B, 4, h, w] | input to embed: noisy latents |
| t | [B] int64 | input to embed: step of the schedule |
| text | [B, 77 n, D] | input to embed: states of both text encoders side by side |
| pooled | [B, P] | input to embed: pooled state of text encoder 2 |
| time_ids | [B, 6] int64 | input to embed: original height and width, crop's top and left, height and width |
| hidden | [B, C, h, w] | embed to head |
| emb | [B, 4 C_0] | embed to the last residual block: time, sizes and pooled text |
| context | [B, 77 n, D] | embed to the last attention |
| skip_0, skip_1, … | [B, C, h, w] | from the way down to the way up, where the newest is taken first |
| prediction | [B, 4, h, w] | output of head |
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from utils.pipeline.layer import PipelineLayer, Stream


def _newest_skip(stream: Stream) -> str:
    return f"skip_{_num_skips(stream) - 1}"


def _num_skips(stream: Stream) -> int:
    return sum(name.startswith("skip_") for name in stream)


def _pushed(stream: Stream, hidden: Tensor) -> Stream:
    return stream.replaced(hidden=hidden, **{f"skip_{_num_skips(stream)}": hidden})


class EmbedLayer(PipelineLayer):
    """Time, sizes and pooled text to one vector, and the first convolution."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.add_time_proj, self.add_embedding = unet.add_time_proj, unet.add_embedding
        self.conv_in = unet.conv_in

    def run(self, stream: Stream) -> Stream:
        dtype = self.conv_in.weight.dtype
        # As at inference, without autocast: the sinusoids are computed in fp32 and rounded once.
        with torch.autocast(stream["x"].device.type, enabled=False):
            emb = self.time_embedding(self.time_proj(stream["t"]).to(dtype))
            sizes = self.add_time_proj(stream["time_ids"].flatten()).unflatten(0, (-1, 6)).flatten(1)
            emb = emb + self.add_embedding(torch.cat([stream["pooled"].float(), sizes], dim=1).to(dtype))
            hidden = self.conv_in(stream["x"].to(dtype))
        return _pushed(Stream(emb=emb, context=stream["text"].to(dtype)), hidden)


class BlockLayer(PipelineLayer):
    """A residual block and the attention after it, if there is one.

    On the way down the result becomes the newest skip, on the way up the newest skip goes in.
    """

    def __init__(self, resnet: nn.Module, attention: nn.Module | None, *, takes_skip: bool = False, makes_skip: bool = False):
        super().__init__()
        self.resnet, self.attention = resnet, attention
        self.takes_skip, self.makes_skip = takes_skip, makes_skip
        self.drop: tuple[str, ...] = ()

    def run(self, stream: Stream) -> Stream:
        hidden, drop = stream["hidden"], self.drop
        if self.takes_skip:
            newest = _newest_skip(stream)
            hidden, drop = torch.cat([hidden, stream[newest]], dim=1), (*drop, newest)
        hidden = self.resnet(hidden, stream["emb"])
        if self.attention is not None:
            hidden = self.attention(hidden, encoder_hidden_states=stream["context"], return_dict=False)[0]
        stream = stream.replaced(drop=drop, hidden=hidden)
        return _pushed(stream, hidden) if self.makes_skip else stream


class MiddleLayer(PipelineLayer):
    """The attention of the middle and the residual block after it."""

    def __init__(self, attention: nn.Module, resnet: nn.Module):
        super().__init__()
        self.attention, self.resnet = attention, resnet

    def run(self, stream: Stream) -> Stream:
        hidden = self.attention(stream["hidden"], encoder_hidden_states=stream["context"], return_dict=False)[0]
        return stream.replaced(hidden=self.resnet(hidden, stream["emb"]))


class DownsampleLayer(PipelineLayer):
    """Half the size."""

    def __init__(self, downsampler: nn.Module):
        super().__init__()
        self.downsampler = downsampler

    def run(self, stream: Stream) -> Stream:
        return _pushed(stream, self.downsampler(stream["hidden"]))


class UpsampleLayer(PipelineLayer):
    """The size of the newest skip, which is twice this one's or, at sizes that were odd, one less."""

    def __init__(self, upsampler: nn.Module):
        super().__init__()
        self.upsampler = upsampler

    def run(self, stream: Stream) -> Stream:
        size = tuple(stream[_newest_skip(stream)].shape[2:])
        return stream.replaced(hidden=self.upsampler(stream["hidden"], size))


class HeadLayer(PipelineLayer):
    """The last norm and convolution."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def run(self, stream: Stream) -> Stream:
        return Stream(prediction=self.conv_out(self.conv_act(self.conv_norm_out(stream["hidden"]))))


def sdxl_layers(unet: UNet2DConditionModel) -> list[PipelineLayer]:
    """The forward in order: embed, the way down, the middle, the way up, head; 23 layers for the released model."""
    layers: list[PipelineLayer] = [EmbedLayer(unet)]
    for level in unet.down_blocks:
        layers += [BlockLayer(*pair, makes_skip=True) for pair in _pairs(level)]
        layers += [DownsampleLayer(module) for module in level.downsamplers or ()]
    middle = unet.mid_block
    layers += [BlockLayer(middle.resnets[0], None), MiddleLayer(middle.attentions[0], middle.resnets[1])]
    for level in unet.up_blocks:
        layers += [BlockLayer(*pair, takes_skip=True) for pair in _pairs(level)]
        layers += [UpsampleLayer(module) for module in level.upsamplers or ()]
    # After its last use nothing reads a part of the stream any more.
    blocks = [layer for layer in layers if isinstance(layer, BlockLayer)]
    blocks[-1].drop += ("emb",)
    next(block for block in reversed(blocks) if block.attention is not None).drop += ("context",)
    return [*layers, HeadLayer(unet)]


def _pairs(level: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """The residual blocks of a level, each with the attention that follows it."""
    attentions = getattr(level, "attentions", None) or [None] * len(level.resnets)
    return list(zip(level.resnets, attentions, strict=True))
