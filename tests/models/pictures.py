"""Pixels as the pictures that diffusers' pipelines take."""

import torch
from PIL import Image
from torch import Tensor


def as_picture(pixels: Tensor, frame: int = 0) -> Image.Image:
    """A frame of [3, F, H, W] in [-1, 1], which was made of 8-bit levels."""
    levels = ((pixels[:, frame] + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
