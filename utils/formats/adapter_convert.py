"""An adapter file in another layout, at the same strength.

What a layout cannot say is kept in the file's metadata, so that the way back gives the same tensors: diffusers' and PEFT's files
have no ``.alpha``, so the scale is multiplied into a tensor there, which is written in a dtype that gives it back.  Only of fp32
tensors at a scale that is no power of two the last bit may differ on the way back.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from utils.formats.adapter_files import ReadWeight
from utils.formats.adapter_format import ALPHA, MAGNITUDE, SCALE, LoraFormat
from utils.formats.adapter_kinds import Adapter, strength_part, with_comfy_scale, with_peft_magnitude
from utils.formats.adapter_layouts import split
from utils.formats.adapter_writing import Placed, placed, without_alpha
from utils.formats.peft_config import DIFFUSERS_CONFIG
from utils.formats.recognise import KnownFamily
from utils.weights.keymap import KeyMap, ModulePlace

LayoutName = Literal["comfy", "diffusers", "kohya", "peft"]
RECORD = "flowstage.before"
"""Metadata key: what the file was like where its layout cannot say it."""
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


def layout_format(layout: LayoutName, family: KnownFamily) -> LoraFormat:
    """How a family's files are spelt in a layout."""
    others = family.lora_format.others
    plain = {prefix: LoraFormat(prefix, "diffusers", magnitude="lora_magnitude_vector") for prefix in others}
    formats = {
        "comfy": family.lora_format
        if family.lora_format.names == "released"
        else LoraFormat("diffusion_model.", "released", unfused=family.lora_format, others=others),
        "kohya": LoraFormat("lora_unet_", "released", "lora_down", "lora_up", "_", writes_alpha=True, others=others),
        "diffusers": LoraFormat(f"{family.facts.folder}.", "diffusers", magnitude="lora_magnitude_vector", others=plain),
        "peft": LoraFormat("base_model.model.", "diffusers", magnitude="lora_magnitude_vector"),
    }
    return formats[layout]


def converted(
    places: Mapping[ModulePlace, Adapter],
    key_map: KeyMap,
    family: KnownFamily,
    layout: LayoutName,
    metadata: Mapping[str, str],
    base: ReadWeight | None,
) -> tuple[dict[Placed, Adapter], dict[str, str]]:
    """The adapters of the file in the layout, and its metadata.

    ``base`` reads the base weights by diffusers name: a DoRA's magnitude is told by them where ComfyUI's form becomes PEFT's or the
    other way round.  ValueError for what the layout cannot hold.
    """
    record = Record.of(metadata)
    places = {place: record.restored(place, adapter) for place, adapter in places.items()}
    fmt = layout_format(layout, family)
    several = len({adapter.rank for adapter in places.values()}) > 1
    if several and family.lora_format.writes_alpha and all(a.scale == 1 and a.alpha_dtype is None for a in places.values()):
        fmt = without_alpha(fmt)
    modules: dict[str, Adapter] = {}
    whole: dict[Placed, Adapter] = {}
    for place, adapter in places.items():
        own, _ = fmt.of(place.modules[0])
        if place.layout == own.names == "released" and MAGNITUDE not in adapter.parts:
            whole[own, place.path] = adapter
            continue
        for module, part in split(place, adapter, key_map).items():
            if module in modules:
                raise ValueError(f"{module} has more than one adapter")
            modules[module] = _with_magnitude(part, own, module, base)
    joined = placed(modules, key_map, fmt, detect_shared=True)
    if both := [path for own, path in joined if (own, path) in whole]:
        raise ValueError(f"{both[0]} has an adapter of its own and one of its parts")
    found, record = _as_the_layout_says_it({**joined, **whole}, fmt, carries_alpha=layout in ("comfy", "kohya"))
    kept = {key: value for key, value in metadata.items() if key not in (RECORD, DIFFUSERS_CONFIG)}
    return found, kept | record.metadata()


def _with_magnitude(adapter: Adapter, fmt: LoraFormat, module: str, base: ReadWeight | None) -> Adapter:
    """A DoRA in the form of the format; anything else as it is."""
    given, wanted = (MAGNITUDE, SCALE) if fmt.magnitude == SCALE else (SCALE, MAGNITUDE)
    if given not in adapter.parts:
        return adapter
    if base is None:
        raise ValueError(f"{module} is a DoRA, whose {wanted} is told by the base model's weights: name them with --base")
    read = partial(base, f"{module}.weight")
    return with_comfy_scale(adapter, read) if wanted == SCALE else with_peft_magnitude(adapter, read())


def _as_the_layout_says_it(
    adapters: Mapping[Placed, Adapter], fmt: LoraFormat, *, carries_alpha: bool
) -> tuple[dict[Placed, Adapter], "Record"]:
    """With ``.alpha``, or with the scale in a tensor; and what is to be known for the way back."""
    found: dict[Placed, Adapter] = {}
    scales = {}
    for (own, path), adapter in adapters.items():
        if carries_alpha and adapter.rank:
            needs_alpha = adapter.scale != 1 and adapter.alpha_dtype is None
            found[own, path] = replace(adapter, alpha_dtype=torch.float32) if needs_alpha else adapter
            continue
        if adapter.alpha_dtype or adapter.scale != 1:
            scales[path if own == fmt else own.prefix + path] = adapter.scale
        parts = adapter.parts if carries_alpha else {part: tensor for part, tensor in adapter.parts.items() if part != ALPHA}
        found[own, path] = _folded(replace(adapter, parts=parts))
    dtypes = {adapter.parts[strength_part(adapter.parts)].dtype for adapter in adapters.values()}
    alphas = [adapter.alpha_dtype for adapter in adapters.values() if adapter.alpha_dtype]
    uniform = len(scales) == len(adapters) and len(set(scales.values())) == 1
    record = Record(
        is_known=True,
        scales=next(iter(scales.values())) if uniform else scales,
        alpha_dtype=alphas[0] if alphas else None,
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
    )
    return found, record


def _folded(adapter: Adapter) -> Adapter:
    """With scale 1, in the tensor's own dtype if that holds the product exactly (as with powers of two), else in fp32."""
    if adapter.scale == 1:
        return replace(adapter, alpha_dtype=None)
    folded = adapter.folded()
    part = strength_part(adapter.parts)
    exact, own = folded.parts[part], adapter.parts[part].dtype
    return replace(folded, parts={**folded.parts, part: exact.to(own)}) if torch.equal(exact.to(own).float(), exact) else folded


@dataclass(frozen=True)
class Record:
    """What a file was like before it was converted."""

    is_known: bool = False
    scales: float | Mapping[str, float] = 1.0
    """The scale that was multiplied into a tensor: by module, or of all."""
    alpha_dtype: torch.dtype | None = None
    """Of ``.alpha``; None if there was none."""
    dtype: torch.dtype | None = None
    """Of the tensor that the scale was multiplied into; None if they differed."""

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Record":
        """From a file's metadata; nothing is known if it has none."""
        try:
            told: dict[str, Any] = json.loads(metadata[RECORD])
            return cls(True, told["scale"], _DTYPES.get(told["alpha_dtype"]), _DTYPES.get(told["dtype"]))
        except (KeyError, ValueError, TypeError):
            return cls()

    def metadata(self) -> dict[str, str]:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        told = {"scale": self.scales, "alpha_dtype": names.get(self.alpha_dtype), "dtype": names.get(self.dtype)}
        return {RECORD: json.dumps(told, sort_keys=True)}

    def restored(self, place: ModulePlace, adapter: Adapter) -> Adapter:
        """The adapter as it was.  Its strength is that of the file in any case."""
        if not self.is_known:
            return adapter
        scale = self.scales if isinstance(self.scales, float) else self.scales.get(place.path)
        if scale is None or adapter.alpha_dtype:
            return adapter if self.alpha_dtype or adapter.scale != 1 else replace(adapter, alpha_dtype=None)
        part = strength_part(adapter.parts)
        value = adapter.parts[part]
        before = (value.float() / scale).to(self.dtype or value.dtype)
        return replace(adapter, parts={**adapter.parts, part: before}, scale=adapter.scale * scale, alpha_dtype=self.alpha_dtype)
