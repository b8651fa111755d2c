"""What one module's adapter is: its kind, its rank, whether its tensors fit together, and its strength."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.formats.adapter_format import DOWN, MAGNITUDE, PARTS_OF, SCALE, UP, Kind, Parts

_NEEDED = {
    "lora": ((DOWN,), (UP,)),
    "loha": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "lokr": (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
}
"""Of each group one part must be there."""
_RANKS = {"lora": (DOWN,), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}
"""The rank is the number of rows of the first of these; LoKr of two full factors has none."""
_STRENGTH_IN = {"lora": (UP,), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}


@dataclass(frozen=True)
class Adapter:
    """One module's adapter: the weight changes by ``scale`` times what the parts make."""

    parts: Parts
    scale: float = 1.0
    alpha_dtype: torch.dtype | None = None
    """Of the file's ``.alpha``, which says the scale; None without one: then the scale is 1, or PEFT's config says it."""

    @property
    def base_kind(self) -> str:
        """The kind of the difference: ``lora``, ``loha`` or ``lokr``."""
        return next(kind for kind, parts in PARTS_OF.items() if any(part in self.parts for part in parts))

    @property
    def kind(self) -> Kind:
        """The kind, ``dora`` for a LoRA with a magnitude."""
        return "dora" if {SCALE, MAGNITUDE} & set(self.parts) else self.base_kind

    @property
    def rank(self) -> int | None:
        """None for a LoKr of two full factors; readers ignore ``.alpha`` then."""
        return rank_of(self.parts)

    @property
    def rows(self) -> int:
        """Rows of the weight it is for."""
        parts = self.parts
        if self.base_kind == "lora":
            return len(parts[UP])
        if self.base_kind == "loha":
            return parts["hada_w1_a"].shape["hada_t1" in parts]
        (left, _), (right, _) = factor_shapes(parts)
        return left * right

    @property
    def columns(self) -> int:
        """Columns of the weight it is for; of a convolution its input channels, or those times its kernel's size."""
        parts = self.parts
        if self.base_kind == "lora":
            return parts[DOWN].shape[1]
        if self.base_kind == "loha":
            return parts["hada_w1_b"].shape[1]
        (_, left), (_, right) = factor_shapes(parts)
        return left * right

    def folded(self) -> "Adapter":
        """The same with scale 1: the scale is multiplied into one tensor, which becomes fp32."""
        part = strength_part(self.parts)
        return replace(self, parts={**self.parts, part: self.parts[part].float() * self.scale}, scale=1.0, alpha_dtype=None)


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that ``.alpha`` is divided by; None for a LoKr of two full factors."""
    return next((len(parts[part]) for names in _RANKS.values() for part in names if part in parts), None)


def factor_shapes(parts: Parts) -> list[tuple[int, int]]:
    """Rows and columns of the two factors of a LoKr; of a convolution the columns may be those times the kernel's size."""
    shapes = []
    for number in "12":
        if (whole := parts.get(f"lokr_w{number}")) is not None:
            shapes.append((whole.shape[0], whole.shape[1]))
        else:
            turned = number == "2" and "lokr_t2" in parts  # then [rank, out]
            shapes.append((parts[f"lokr_w{number}_a"].shape[turned], parts[f"lokr_w{number}_b"].shape[1]))
    return shapes


def strength_part(parts: Parts) -> str:
    """The tensor that a scale is multiplied into."""
    return next(part for names in _STRENGTH_IN.values() for part in names if part in parts)


def problem_of(parts: Parts) -> str | None:
    """What is wrong with a module's tensors; None if they make an adapter."""
    kinds = [kind for kind, known in PARTS_OF.items() if any(part in parts for part in known)]
    if len(kinds) != 1:
        return f"has tensors of several kinds: {', '.join(kinds)}" if kinds else f"has no adapter, only {', '.join(parts)}"
    [kind] = kinds
    if kind != "lora" and {SCALE, MAGNITUDE} & set(parts):
        return f"has a magnitude (DoRA) beside {kind}, which only a LoRA can have here"
    if missing := [group for group in _NEEDED[kind] if not any(part in parts for part in group)]:
        return f"has no {missing[0][-1]}"
    if not _FITS[kind](parts):
        shapes = [str(list(parts[part].shape)) for part in PARTS_OF[kind] if part in parts]
        return f"has matrices that do not fit together: {' and '.join(shapes)}"
    return None


def _lora_fits(parts: Parts) -> bool:
    return parts[UP].ndim > 1 and parts[UP].shape[1] == len(parts[DOWN])


def _loha_fits(parts: Parts) -> bool:
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        return False
    rows = 0 if "hada_t1" in parts else 1
    halves = [(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2)]
    same = {(a.shape[1 - rows], b.shape[1]) for a, b in halves}
    return len(same) == 1 and all(a.shape[rows] == len(b) for a, b in halves)


def _lokr_fits(parts: Parts) -> bool:
    pairs = [
        (parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"], i == 2 and "lokr_t2" in parts) for i in (1, 2) if f"lokr_w{i}" not in parts
    ]
    return all(first.shape[0 if middle else 1] == len(second) for first, second, middle in pairs)


_FITS = {"lora": _lora_fits, "loha": _loha_fits, "lokr": _lokr_fits}


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each row, in fp32, in ComfyUI's shape: [out, 1], of a convolution [out, 1, 1, 1]."""
    return weight.float().flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))


def _norms(adapter: Adapter, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row norms of the base weight and of the base weight with what the LoRA adds."""
    down, up = (adapter.parts[part].float().flatten(1) for part in (DOWN, UP))
    delta = (up @ down).view(weight.shape)
    # A row of zeros has no direction; without the limit it would make a NaN.
    return row_norms(weight), row_norms(weight.float() + adapter.scale * delta).clamp_min(torch.finfo(torch.float32).tiny)


def with_comfy_scale(adapter: Adapter, weight: Callable[[], Tensor]) -> Adapter:
    """A DoRA with PEFT's magnitude m, as ComfyUI reads it: m |W| / |W + D|, for ComfyUI divides by the base weight's norm |W|.

    ``weight`` reads W.  A row of W that is all zeros gets the scale 0: there ComfyUI cannot compute what PEFT does.
    """
    parts = dict(adapter.parts)
    magnitude = parts.pop(MAGNITUDE)
    if magnitude.is_meta:
        return replace(adapter, parts={**parts, SCALE: magnitude.new_empty(magnitude.numel(), *(1 for _ in parts[DOWN].shape[1:]))})
    base, changed = _norms(adapter, weight())
    return replace(adapter, parts={**parts, SCALE: magnitude.float().view(base.shape) * base / changed})


def with_peft_magnitude(adapter: Adapter, weight: Tensor) -> Adapter:
    """The way back.  ValueError for a magnitude of columns, which PEFT does not have."""
    parts = dict(adapter.parts)
    scale = parts.pop(SCALE)
    if len(scale) != adapter.rows:
        raise ValueError(f"its magnitude {list(scale.shape)} is of columns, not of rows")
    base, changed = _norms(adapter, weight)
    magnitude = scale.float().view(base.shape) * changed / base.clamp_min(torch.finfo(torch.float32).tiny)
    magnitude = magnitude.flatten() if weight.ndim == 2 else magnitude.transpose(0, 1)
    return replace(adapter, parts={**parts, MAGNITUDE: magnitude})
