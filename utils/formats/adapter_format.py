"""How adapters are spelt in files: the kinds and their tensors, and how a key is made of a module's path and a tensor's name.

A tensor of an adapter is known by PEFT's name for it without the adapter's own (``lora_A.weight``, ``hada_w1_a``), here called a
part.  The formulas are those of ComfyUI (``comfy/weight_adapter``) and PEFT, which agree but for DoRA's magnitude.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Kind = Literal["lora", "dora", "loha", "lokr"]
Parts = Mapping[str, Tensor]
"""One module's adapter: tensors by part."""

DOWN, UP = "lora_A.weight", "lora_B.weight"
MAGNITUDE = "lora_magnitude_vector.weight"
"""PEFT's: the row norm of the new weight, [out], of a convolution [1, out, 1, 1]."""
SCALE = "dora_scale"
"""ComfyUI's: with [out, 1] the new weight is (W + D) * scale / row norm of **W**; with [1, in] it is divided by the column norm of
W + D.  Of a convolution [out, 1, 1, 1]."""
ALPHA = "alpha"

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PARTS_OF: dict[str, tuple[str, ...]] = {"lora": (DOWN, UP), "loha": _LOHA, "lokr": _LOKR}
"""By the kind of the difference that is added; ``dora`` is ``lora`` with a magnitude."""

_DOWNS = (
    "lora_A.weight",
    "lora_down.weight",
    "lora_A.default.weight",
    "lora.down.weight",
    "lora_linear_layer.down.weight",
    "lora_A",
)
_UPS = ("lora_B.weight", "lora_up.weight", "lora_B.default.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_B")
_MAGNITUDES = ("lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "lora_magnitude_vector")
ENDINGS: dict[str, str] = {
    **{f".{ending}": DOWN for ending in _DOWNS},
    **{f".{ending}": UP for ending in _UPS},
    **{f".{ending}": MAGNITUDE for ending in _MAGNITUDES},
    **{f".{part}": part for part in (*_LOHA, *_LOKR, SCALE, ALPHA)},
}
"""What may stand after the module's path in a key, and the part that it is."""

NO_ADAPTER = {
    (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm"): "a whole difference of a weight or bias",
    (".lora_mid.weight",): "the middle of a convolution's LoRA in three parts",
    (".lora_B.bias", ".lora_up.bias"): "the bias of a LoRA",
    (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"): "GLoRA",
    (".oft_blocks", ".oft_diag"): "OFT",
}
"""Endings of what other trainers write and an adapter here cannot hold."""

PATH_SPELLINGS = (
    ("diffusion_model.", ".", ""),
    ("transformer.", ".", ""),
    ("unet.", ".", ""),
    ("base_model.model.", ".", ""),
    ("", ".", ""),
    ("lora_unet_", "_", ""),
    ("lora_transformer_", "_", ""),
    ("lycoris_", "_", ""),
    ("lora_te1_", "_", "text_encoder_"),
    ("lora_te2_", "_", "text_encoder_2_"),
)
"""What stands before a module's path, what between its parts, and what belongs to the path in its stead."""


@dataclass(frozen=True)
class LoraFormat:
    """How the keys of a family's adapter files are spelt, so that ComfyUI and diffusers both read them whole.

    A key is ``prefix``, the module's path, ``.``, ``down`` or ``up``, ``.weight``; or another part's name.
    """

    prefix: str
    """What stands before the module's path (`diffusion_model.`)."""
    names: Literal["released", "diffusers"]
    """Whose paths."""
    down: str = "lora_A"
    """The matrix [rank, in]."""
    up: str = "lora_B"
    """The matrix [out, rank]."""
    separator: Literal[".", "_"] = "."
    """Between the parts of the path (kohya's names have `_`)."""
    writes_alpha: bool = False
    """Whether `.alpha` = rank is written.  Only where every reader takes it: either way each reader applies strength 1."""
    magnitude: Literal["dora_scale", "lora_magnitude_vector"] = "dora_scale"
    """Whose magnitude of a DoRA: ComfyUI's or PEFT's."""
    unfused: "LoraFormat | None" = None
    """How adapters are spelt that cannot become one where the release fuses modules; None: they cannot be written."""
    others: Mapping[str, "LoraFormat"] = field(default_factory=dict, hash=False)
    """Of networks beside the transformer: prefix of diffusers names -> how those are spelt; what follows the prefix is the path."""

    def key(self, path: str, part: str) -> str:
        return f"{self.prefix}{path.replace('.', self.separator)}.{part}"

    def of(self, module: str) -> tuple["LoraFormat", str]:
        """How a diffusers module is spelt: the format that counts for it, and the path in there."""
        for prefix, other in self.others.items():
            if module.startswith(prefix):
                return other, module.removeprefix(prefix)
        return self, module

    def ending(self, part: str) -> str:
        """What stands after the path and a dot for a part."""
        return {DOWN: f"{self.down}.weight", UP: f"{self.up}.weight", MAGNITUDE: self.magnitude}.get(part, part)
