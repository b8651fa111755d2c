"""The rules of a key map: how tensors of diffusers make one tensor of a release, and how they are found in it.

A pattern is a name with places in braces: ``{p}`` stands for ``weight`` or ``bias``, any other (``{i}``) for a block's number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from utils.errors import UserError


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where one diffusers tensor is found: some rows of the tensor ``key``, then ``convert`` (which works on meta tensors too)."""

    key: str
    share: tuple[int, int, int] | None = None
    """``(start, stop, whole)``: rows ``start / whole`` to ``stop / whole``.  None: all of it."""
    convert: Callable[[Tensor], Tensor] = _unchanged

    def rows(self, shape: Sequence[int]) -> slice | None:
        """The rows to read of a tensor of ``shape``; None for all.  UserError if the shares do not divide its rows."""
        if self.share is None:
            return None
        start, stop, whole = self.share
        if not shape or shape[0] % whole:
            raise UserError(f"{self.key} has the shape {list(shape)}; its rows should be a multiple of {whole}")
        return slice(start * (shape[0] // whole), stop * (shape[0] // whole))

    def take(self, tensor: Tensor) -> Tensor:
        """The diffusers tensor, given the whole one."""
        rows = self.rows(tensor.shape)
        return self.convert(tensor if rows is None else tensor[rows])


class Rule(Protocol):
    """How tensors of diffusers make one tensor of the release (``join``) and are found in it (``source``)."""

    released: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The diffusers patterns."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The released tensor, from one tensor for each part."""

    def source(self, part: int, key: str) -> Source:
        """Where part number ``part`` lies in the released tensor ``key``."""


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    diffusers: str
    released: str

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.diffusers,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def source(self, part: int, key: str) -> Source:
        return Source(key)


@dataclass(frozen=True)
class Fuse:
    """Several tensors that the release holds as one, joined along the rows in this order.

    ``shares`` gives the parts' rows in proportion, e.g. ``(1, 1, 1, 4)`` for q, k, v and an MLP of four times the width.
    """

    released: str
    diffusers: tuple[str, ...]
    shares: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "diffusers", tuple(self.diffusers))
        object.__setattr__(self, "shares", tuple(self.shares) or (1,) * len(self.diffusers))
        assert len(self.shares) == len(self.diffusers), f"{self.released}: one share for each of {self.diffusers}"

    @property
    def parts(self) -> tuple[str, ...]:
        return self.diffusers

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = [tensor.shape[0] for tensor in tensors]
        if any(count * self.shares[0] != rows[0] * share for count, share in zip(rows, self.shares, strict=True)):
            raise ValueError(f"the parts of {self.released} have {rows} rows; they should be in proportion {list(self.shares)}")
        return torch.cat(list(tensors))

    def source(self, part: int, key: str) -> Source:
        return Source(key, (sum(self.shares[:part]), sum(self.shares[: part + 1]), sum(self.shares)))


@dataclass(frozen=True)
class Transform:
    """A tensor that the release holds in another form: ``forward`` makes the released tensor, ``inverse`` undoes it.

    For the weight of a module that can have a LoRA both work on rows alone and linearly (a permutation, a scale per row), so that
    ``to_released({"<module>.weight": B})`` is right for the LoRA's B too.
    """

    diffusers: str
    released: str
    forward: Callable[[Tensor], Tensor] = field(repr=False)
    inverse: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.diffusers,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.forward(tensors[0])

    def source(self, part: int, key: str) -> Source:
        return Source(key, convert=self.inverse)
