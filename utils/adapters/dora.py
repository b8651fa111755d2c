"""DoRA's layers, with the length of a weight's rows in fp32.

PEFT 0.21 measures rows in the dtype that the layer computes in.  In bf16 a length has three digits, and the adapter would change
the model by some tenths of a percent before it has learnt anything.
"""

import torch
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer, DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from utils.adapters.deltas import row_norms


class _ExactRows:
    """Both methods are PEFT's, whose callers take no gradient through what they return (section 4.3 of the paper)."""

    @torch.no_grad()
    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Tensor:
        """B A [out, in]."""
        with torch.autocast(lora_A.weight.device.type, enabled=False):
            return lora_B.weight.float().flatten(1) @ lora_A.weight.float().flatten(1)

    @torch.no_grad()
    def get_weight_norm(self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None) -> Tensor:
        """[out], for a convolution [1, out, 1, ...]."""
        norms = row_norms(weight.float() + scaling * lora_weight)
        return norms.view(1, -1, *[1] * (weight.dim() - 2)) if weight.dim() > 2 else norms


class _Linear(_ExactRows, DoraLinearLayer):
    pass


class _Conv1d(_ExactRows, DoraConv1dLayer):
    pass


class _Conv2d(_ExactRows, DoraConv2dLayer):
    pass


class _Conv3d(_ExactRows, DoraConv3dLayer):
    pass


_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    DoraLinearLayer: _Linear,
    DoraConv1dLayer: _Conv1d,
    DoraConv2dLayer: _Conv2d,
    DoraConv3dLayer: _Conv3d,
}


def measure_rows_exactly(model: nn.Module) -> None:
    """Replace PEFT's DoRA layers by ours, and hold their magnitudes in fp32."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, layer in module.lora_magnitude_vector.items():
                exact = _EXACT[type(layer)](fan_in_fan_out=False)
                exact.weight = nn.Parameter(layer.weight.data.float())
                module.lora_magnitude_vector[name] = exact
