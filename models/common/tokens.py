"""Latents as tokens: the packing of 2x2 squares that FLUX.1 and Qwen-Image share."""

from torch import Tensor

SIDE = 2
"""A token is a square of so many latent pixels a side."""


def pack(latents: Tensor) -> Tensor:
    """[..., C, H, W] to [..., H/2 * W/2, 4 C]: squares in rows, and in each the channel first, then the row, then the column.

    As ``_pack_latents`` of diffusers' pipelines.
    """
    squares = latents.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE))  # [..., C, h, 2, w, 2]
    return squares.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`.  ``height`` and ``width`` are counted in tokens."""
    squares = tokens.unflatten(-2, (height, width)).unflatten(-1, (-1, SIDE, SIDE))  # [..., h, w, C, 2, 2]
    return squares.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)
