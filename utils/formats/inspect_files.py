"""What a file is, in a few lines: whose model, layout, kind, ranks, strength, and what is left over."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from utils.formats.adapter_files import NAMED_PROBLEMS, AdapterKeys, prefix_of, scale_of
from utils.formats.adapter_format import ALPHA
from utils.formats.adapter_kinds import Adapter, problem_of
from utils.formats.model_convert import leftover, marks_in
from utils.formats.peft_config import peft_configs
from utils.formats.recognise import (
    FoundAdapter,
    FoundNetwork,
    KnownFamily,
    block_counts,
    matching,
    model_size,
    on_meta,
    recognise_adapter,
    recognise_model,
)
from utils.weights.tensor_files import SafetensorsFile, TensorInfo

LAYOUTS = {
    "diffusion_model.": "comfy",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "base_model.model.": "peft",
    "lora_unet_": "kohya",
    "lora_te1_": "kohya",
    "lora_te2_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
"""Who writes the prefixes of adapter files."""
TOLD = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.resolution",
    "modelspec.date",
    "modelspec.timestep_range",
    "ss_base_model_version",
    "ss_output_name",
    "ss_steps",
    "ss_epoch",
    "ss_learning_rate",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_num_train_images",
)
"""Keys of the metadata that are worth telling."""


def has_adapters(entries: Mapping[str, TensorInfo]) -> bool:
    """Whether a file is of adapters: whether any of its keys ends as theirs do."""
    return any(set(parts) - {ALPHA} for parts in AdapterKeys.of(entries).adapters.values())


def adapter_lines(file: SafetensorsFile, families: Sequence[KnownFamily]) -> list[str]:
    """What an adapter file is."""
    keys = AdapterKeys.of(file.entries)
    found = recognise_adapter(file.entries, file.metadata, families)
    adapters, broken = {}, []
    configs = peft_configs(file)
    for spelling, parts in keys.adapters.items():
        tensors = on_meta(file.entries, parts)
        if problem := problem_of(tensors):
            broken.append(f"{spelling} {problem}")
            continue
        adapter = Adapter(tensors)
        alpha = file.read(parts[ALPHA]) if ALPHA in parts else None
        adapters[spelling] = Adapter(
            tensors, scale_of(alpha, adapter.rank, configs, spelling), alpha.dtype if ALPHA in parts else None
        )
    kinds = Counter(adapter.kind for adapter in adapters.values())
    lines = [f"adapter of {_families(found)}" if found else "adapter of no model that is known here"]
    lines.append(f"layout: {_layout(adapters)}")
    lines.append(f"kind: {_counted(kinds, 'modules')}")
    lines.append(f"rank: {_counted(Counter(adapter.rank or 'full' for adapter in adapters.values()), 'modules')}")
    lines.append(f"strength: {_counted(Counter(_strength(adapter) for adapter in adapters.values()), 'modules')}")
    lines.append(f"dtype: {_dtypes(file.entries[key] for parts in keys.adapters.values() for key in parts.values())}")
    lines += _told(file.metadata)
    unknown = [key for spelling in (found[0].unknown if found else ()) for key in keys.adapters[spelling].values()] + keys.others
    lines += _listed("left over, of no known module", unknown)
    lines += _listed("not whole", broken)
    return lines


def model_lines(entries: Mapping[str, TensorInfo], metadata: Mapping[str, str], families: Sequence[KnownFamily]) -> list[str]:
    """What a file of a model, or of a part of one, is."""
    networks = recognise_model(entries, families)
    if not networks:
        return [f"no model that is known here; {len(entries)} tensors such as {', '.join(list(entries)[:3])}"]
    lines = []
    for network in networks:
        names = _diffusers_shapes(network, entries)
        sizes = ", ".join(f"{count} {kind}" for kind, count in block_counts(names).items())
        size = network.family.facts.sizes.get(model_size(names)) if network.part == "transformer" else None
        lines.append(_titles(network, families) + f": {sizes}" * bool(sizes) + f", as {size}" * bool(size))
        lines.append(f"layout: {network.layout} names{_after(network)}, {len(network.keys)} tensors")
    lines.append(f"dtype: {_dtypes(entries.values())}")
    lines += _told(metadata)
    if marks := marks_in(entries):
        lines.append(f"marks for ComfyUI: {', '.join(marks)}")
    return lines + _listed("left over, of no known network", leftover(entries, networks))


def _titles(network: FoundNetwork, families: Sequence[KnownFamily]) -> str:
    """What a network is called, by family: several of them may have one with the same keys."""
    titles: dict[str, list[str]] = {}
    for family in families:
        for found in matching(family, list(network.keys)):
            if found.keys == network.keys:
                titles.setdefault(family.facts.networks[found.part].title, []).append(family.name)
    return " or ".join(f"{title} [{', '.join(names)}]" for title, names in titles.items())


def _diffusers_shapes(network: FoundNetwork, entries: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Shapes by diffusers name; those of parts of a fused tensor are the whole one's, which has the same columns."""
    key_map = network.family.facts.networks[network.part].key_map()
    names = key_map.stripped(network.keys)
    return {part: entries[key].shape for name, key in names.items() for part in key_map.diffusers_names(name, network.layout)}


def _after(network: FoundNetwork) -> str:
    names = network.family.facts.networks[network.part].key_map().stripped(network.keys)
    name, key = next(iter(names.items()))
    return f" after `{key.removesuffix(name)}`" if key != name else ""


def _families(found: Sequence[FoundAdapter]) -> str:
    described = []
    for candidate in found:
        size = candidate.family.facts.sizes.get(candidate.size)
        blocks = f"{candidate.size[0]} blocks of width {candidate.size[1]}" if candidate.size else ""
        described.append(f"{candidate.family.name}" + f" ({', '.join(filter(None, [blocks, size]))})" * bool(blocks))
    return " or ".join(described)


def _layout(spellings: Iterable[str]) -> str:
    prefixes = Counter(prefix_of(spelling) for spelling in spellings)
    return ", ".join(
        f"{LAYOUTS.get(prefix, 'bare names')} (`{prefix}`, {count} modules)" for prefix, count in prefixes.most_common()
    )


def _strength(adapter: Adapter) -> str:
    if adapter.rank is None:
        return "1 (two full factors)"
    said = f"alpha {adapter.scale * adapter.rank:g}" if adapter.alpha_dtype else "no alpha"
    return f"{adapter.scale:g} ({said})"


def _counted(counts: Counter, what: str) -> str:
    return ", ".join(f"{value} ({count} {what})" for value, count in counts.most_common())


def _dtypes(infos: Iterable[TensorInfo]) -> str:
    return _counted(Counter(str(info.dtype).removeprefix("torch.") for info in infos), "tensors")


def _told(metadata: Mapping[str, str]) -> list[str]:
    return [f"{key}: {metadata[key]}" for key in TOLD if key in metadata]


def _listed(heading: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - NAMED_PROBLEMS} more" if len(keys) > NAMED_PROBLEMS else ""
    return [f"{heading}: {', '.join(keys[:NAMED_PROBLEMS])}{more}"]
