"""How ComfyUI reads adapters: the names and formulas of its ``comfy/lora.py`` and ``comfy/weight_adapter``, written down once more.

Nothing here is of ``utils``, so that what we write is held against another reader.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_LORA = (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"))
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
_ENDINGS = (*(ending for pair in _LORA for ending in pair), *_LOHA, *_LOKR, "alpha", "dora_scale")


def patched(weights: Mapping[str, Tensor], prefix: str, separator: str, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` by name with the adapters of ``file``, whose keys begin with ``prefix`` and the path.  Every key must be used."""
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.items():
        ending = next(ending for ending in _ENDINGS if key.endswith(f".{ending}"))
        adapters.setdefault(key.removesuffix(f".{ending}"), {})[ending] = tensor
    result = dict(weights)
    for name in [name for name in weights if name.endswith(".weight")]:
        if parts := adapters.pop(prefix + name.removesuffix(".weight").replace(".", separator), None):
            result[name] = _patch(weights[name], parts)
    assert not adapters, f"ComfyUI leaves out {list(adapters)[:5]}"
    return result


def _patch(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    change, rank = _difference(parts)
    scale = float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0
    change = scale * change.reshape(weight.shape)
    if "dora_scale" not in parts:
        return weight + change
    length = parts["dora_scale"].float()
    assert length.shape[0] == weight.shape[0], "of the rows"
    rows = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True).reshape(weight.shape[0], *[1] * (weight.dim() - 1))
    return (weight + change) * (length / (rows + torch.finfo(weight.dtype).eps))


def _difference(parts: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """What is added before the scale, and what alpha is divided by."""
    for up, down in _LORA:
        if up in parts:
            return parts[up].flatten(start_dim=1) @ parts[down].flatten(start_dim=1), parts[down].shape[0]
    if "hada_w1_a" in parts:
        first, second = (parts[f"hada_w{number}_a"] @ parts[f"hada_w{number}_b"] for number in "12")
        return first * second, parts["hada_w1_b"].shape[0]
    rank, factors = None, []
    for number in "12":
        if (whole := parts.get(f"lokr_w{number}")) is None:
            rank = parts[f"lokr_w{number}_b"].shape[0]
            whole = parts[f"lokr_w{number}_a"] @ parts[f"lokr_w{number}_b"]
        factors.append(whole)
    first, second = factors
    if second.dim() == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second), rank
