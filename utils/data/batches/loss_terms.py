"""Where and how much samples count in the loss: their masks and weights, put into the targets that families make.

Families know nothing of it.  A mask is a field of the cache that only samples with one have, ``mask`` fp32
[frames, H / 8, W / 8] in [0, 1], 1 where the loss counts; it is brought to the size of the target by averaging areas, and of a clip
over the frames that become one latent frame.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from utils.data.values import MicroBatch

MASK = "mask"
"""The field's name, and its place in the target."""
WEIGHTS = "weights"


def with_loss_terms(micro_batch: MicroBatch, masks: Sequence[Tensor | None], weights: Sequence[float]) -> MicroBatch:
    """The micro-batch with ``mask`` and ``weights`` in its target, times what is there.

    ``masks`` and ``weights``: one of each sample.  A sample without a mask counts everywhere.  Where no sample has a mask or a
    weight other than 1, the micro-batch stays what it is.  ``utils.diffusion.losses`` says how they are averaged.
    """
    target = dict(micro_batch.target)
    if any(mask is not None and bool((mask != 1).any()) for mask in masks):
        size = target["velocity"].shape[2:]
        mask = torch.stack([torch.ones(1, *size) if mask is None else target_mask(mask, size) for mask in masks])
        target[MASK] = mask * target[MASK] if MASK in target else mask
    if any(weight != 1 for weight in weights):
        own = torch.tensor(weights, dtype=torch.float32)
        target[WEIGHTS] = own * target[WEIGHTS] if WEIGHTS in target else own
    return MicroBatch(micro_batch.inputs, target)


def target_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """[1, *size] of a mask [frames, h, w]; ``size`` is (height, width) or (latent frames, height, width) of the target.

    A latent frame of a clip stands for a group of frames, the first one for the first frame alone.  One frame is the mask of all.
    """
    height, width = size[-2:]
    frames = size[0] if len(size) == 3 else 1
    rows, columns = mask.shape[-2] // height, mask.shape[-1] // width
    assert (rows * height, columns * width) == mask.shape[-2:], f"a mask of {tuple(mask.shape)} for a target of {tuple(size)}"
    mask = functional.avg_pool2d(mask.float().unsqueeze(1), (rows, columns)).squeeze(1)
    if len(mask) == 1:
        mask = mask.expand(frames, -1, -1)
    elif len(mask) != frames:
        group = (len(mask) - 1) // max(1, frames - 1)
        assert group * (frames - 1) == len(mask) - 1, f"a mask of {len(mask)} frames for {frames} latent frames"
        mask = torch.cat([mask[:1], mask[1:].unflatten(0, (-1, group)).mean(1)])
    return mask.reshape(1, *size)
