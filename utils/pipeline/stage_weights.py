"""The weights of one stage, put into its layers: only what the stage needs is read."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from utils.pipeline.layer import PipelineLayer
from utils.weights.named import NamedWeights, canonical_name, materialise


def names_of(layers: Sequence[PipelineLayer], transformer: nn.Module) -> list[str]:
    """Canonical names of the parameters and persistent buffers that these layers own, in the model's order."""
    own = {id(tensor) for layer in layers for tensor in layer.state_dict(keep_vars=True).values()}
    return [canonical_name(name) for name, tensor in transformer.state_dict(keep_vars=True).items() if id(tensor) in own]


def fill_stage(
    transformer: nn.Module,
    layers: Sequence[PipelineLayer],
    base: NamedWeights,
    trained: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Values for what the layers own: ``trained`` where it has the name (a checkpoint, a new adapter), else the model's files."""
    names = names_of(layers, transformer)
    materialise(transformer, [name for name in names if name in trained], trained, device=device)
    materialise(transformer, [name for name in names if name not in trained], base, device=device)
