"""What each kind of adapter adds to a weight: pure mathematics, by the names of the adapter's parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.formats.adapter_format import DOWN, MAGNITUDE, UP, Parts


def delta(kind: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """What an adapter of scale 1 adds to a weight of ``shape``, in fp32."""
    return DELTAS[kind]({name: value.float() for name, value in parts.items()}).reshape(shape)


def adapted(weight: Tensor, kind: str, parts: Parts, scale: float, strength: float = 1.0) -> Tensor:
    """The fp32 ``weight`` [out, ...] with an adapter: at strength 1 the weight that the adapter makes of it, at 0 itself."""
    change = scale * delta(kind, parts, tuple(weight.shape))
    if kind == "dora":
        # Liu et al. 2024, arXiv 2402.09353, equation 5: every row of W + D is given the length that was learnt for it.
        moved = weight + change
        lengths = parts[MAGNITUDE].float().flatten() / row_norms(moved)
        change = moved * lengths.view(-1, *[1] * (weight.dim() - 1)) - weight
    return weight + strength * change


def row_norms(weight: Tensor) -> Tensor:
    """Length [out] of each row of a weight [out, ...]."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def _lora(parts: Parts) -> Tensor:
    """Hu et al. 2021, arXiv 2106.09685; a convolution's B is 1x1, so that its A has the kernel."""
    return parts[UP].flatten(1) @ parts[DOWN].flatten(1)


def _loha(parts: Parts) -> Tensor:
    """Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098: proposition 1, or 3 where there is a kernel ``t``."""
    first, second = (_hadamard_factor(parts, number) for number in "12")
    return first * second


def _hadamard_factor(parts: Parts, number: str) -> Tensor:
    left, right, kernel = (parts.get(f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    return left @ right if kernel is None else torch.einsum("ijkl,ip,jr->prkl", kernel, left, right)


def _lokr(parts: Parts) -> Tensor:
    """Yeh et al. 2023 (LyCORIS), arXiv 2309.14859: a Kronecker product of two factors, each whole or of low rank."""
    first, second = (_kronecker_factor(parts, number) for number in "12")
    return torch.kron(first.view(*first.shape, *[1] * (second.dim() - 2)), second.contiguous())


def _kronecker_factor(parts: Parts, number: str) -> Tensor:
    whole, left, right, kernel = (
        parts.get(f"lokr_{name}{number}{end}") for name, end in (("w", ""), ("w", "_a"), ("w", "_b"), ("t", ""))
    )
    if whole is not None:
        return whole
    return left @ right if kernel is None else torch.einsum("ijkl,ip,jr->prkl", kernel, left, right)


DELTAS: dict[str, Callable[[Parts], Tensor]] = {"lora": _lora, "dora": _lora, "loha": _loha, "lokr": _lokr}
"""By the kind of a file: an rsLoRA is a LoRA of another scale."""
