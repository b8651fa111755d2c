"""Which parts of a sample the loss counts, as the cache holds it."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.values import Sample

SIDE = 8
"""Pixels along each side of what becomes one value."""


def has_mask(sample: Sample) -> bool:
    return sample.mask is not None or sample.alpha_mask


class MaskEncoder(ConditionEncoder):
    """A sample's mask to ``mask`` [frames, H / 8, W / 8], fp32 in [0, 1]: the mean over 8 x 8 pixels of each frame.

    It has no network.  Samples without a mask have no such field.
    """

    name = "mask"
    reads = "mask"

    def fingerprint(self) -> str:
        return f"mean over {SIDE} x {SIDE} pixels"

    def load(self, device: torch.device) -> None: ...

    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"mask": avg_pool2d(item.mask[0], SIDE)} for item in items]

    def unload(self) -> None: ...
