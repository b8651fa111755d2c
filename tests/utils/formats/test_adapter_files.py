"""Adapter files of every kind as PEFT and diffusers save them, and what is refused."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from models.sd3.keys import sd3_key_map
from utils.adapters.deltas import adapted
from utils.errors import UserError
from utils.formats.adapter_files import read_adapter
from utils.formats.adapter_format import LoraFormat
from utils.formats.adapter_kinds import Adapter, factor_shapes, problem_of
from utils.formats.adapter_layouts import by_module, module_of, modules_of, unwritable
from utils.weights.keymap import Fuse, KeyMap, Rename, Transform

MODULES = ("to_q", "to_k", "to_v", "norm", "out", "conv")
TABLE = KeyMap(
    [
        Fuse("qkv.{p}", ("to_q.{p}", "to_k.{p}", "to_v.{p}")),
        Transform("norm.{p}", "mod.{p}", forward=lambda w: w.roll(2, 0), inverse=lambda w: w.roll(-2, 0)),
        Rename("out.{p}", "proj.{p}"),
        Rename("conv.{p}", "kernel.{p}"),
    ]
)
COMFY = LoraFormat("diffusion_model.", "released")
DIFFUSERS = LoraFormat("transformer.", "diffusers")


class Network(nn.Module):
    """Modules of each kind that a release treats otherwise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("to_q", "to_k", "to_v", "norm", "out"):
            setattr(self, name, nn.Linear(12, 8, bias=False))
        self.conv = nn.Conv2d(4, 6, 3, bias=False)


CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=3, rank_pattern={"^out": 2}, alpha_pattern={"^out": 5}, target_modules=list(MODULES)),
    "rslora": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=list(MODULES)),
    "dora": LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=list(MODULES)),
    "loha": LoHaConfig(r=4, alpha=3, target_modules=list(MODULES)),
    "loha with a kernel": LoHaConfig(r=4, alpha=3, use_effective_conv2d=True, target_modules=["conv"]),
    "lokr": LoKrConfig(r=2, alpha=3, rank_pattern={"^out": 9}, alpha_pattern={"^out": 5}, target_modules=list(MODULES)),
    "lokr of four": LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=list(MODULES)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_read_at_its_strength(name, tmp_path):
    model = get_peft_model(Network(), CONFIGS[name])
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            torch.manual_seed(index)
            nn.init.normal_(parameter, mean=0.1)
    model.save_pretrained(tmp_path)
    read = read_adapter(tmp_path / "adapter_model.safetensors", MODULES, TABLE)
    assert read.kind == name.split()[0].replace("rslora", "lora")
    base = Network().state_dict()
    merged = model.merge_and_unload().state_dict()
    for module, names in by_module(read.weights).items():
        parts = {part: read.weights[weight] for part, weight in names.items()}
        found = adapted(base[f"{module}.weight"], read.kind, parts, read.scales[module])
        torch.testing.assert_close(found, merged[f"{module}.weight"], rtol=1e-4, atol=1e-5)


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )


@pytest.mark.parametrize("by", ["pipeline", "network"])
def test_what_diffusers_saves_is_read_at_its_strength(by, tmp_path):
    """It writes no alpha but puts PEFT's config into the metadata."""
    model = sd3()
    config = LoraConfig(r=4, lora_alpha=3, alpha_pattern={"transformer_blocks.1.attn.to_k": 10}, target_modules=["to_q", "to_k"])
    model.add_adapter(config, adapter_name="default")
    if by == "network":
        model.save_lora_adapter(tmp_path)
    else:
        layers = get_peft_model_state_dict(model)
        told = model.peft_config["default"].to_dict()
        StableDiffusion3Pipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata={**told, "target_modules": ["to_q", "to_k"]}
        )
    modules = [name for name, module in sd3().named_modules() if isinstance(module, nn.Linear)]
    read = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", modules, sd3_key_map(2))
    expected = {f"transformer_blocks.{block}.attn.to_{part}": 0.75 for block in (0, 1) for part in "qk"}
    assert read.scales == {**expected, "transformer_blocks.1.attn.to_k": 2.5}


def write(path, shapes, metadata=None):
    torch.manual_seed(1)
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, path, metadata)
    return path


def lora(module, rank=2, rows=8, columns=12):
    return {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**lora("out"), "proj.diff": (8, 12)}, r"proj\.diff is a whole difference of a weight or bias, which is not supported"),
        ({**lora("out"), "proj.diff_b": (8,), "norm.w_norm": (8,)}, r"(?s)norm\.w_norm is a whole.*proj\.diff_b is a whole"),
        ({**lora("out"), "conv.lora_mid.weight": (2, 2, 3, 3)}, "conv.lora_mid.weight is the middle of a convolution's LoRA"),
        ({**lora("out"), "norm.oft_blocks": (2, 2)}, "OFT, which is not supported"),
        ({**lora("out"), "norm.a1.weight": (2, 2)}, "GLoRA, which is not supported"),
        ({**lora("out"), "nothing.lora_A.weight": (2, 12)}, "nothing.lora_A.weight belongs to no module of the model"),
        ({"out.hada_w1_a": (8, 2), "out.hada_w1_b": (2, 12), "out.hada_w2_a": (8, 2)}, "out has no hada_w2_b"),
        ({"out.lokr_w1": (2, 2), "out.lokr_w2_a": (4, 2)}, "out has no lokr_w2_b"),
        (
            {"out.lokr_w1": (2, 2), "out.lokr_w2_a": (4, 2), "out.lokr_w2_b": (3, 6)},
            r"do not fit together: \[2, 2\] and \[4, 2\] and \[3, 6\]",
        ),
        ({**lora("out"), "out.lokr_w1": (2, 2), "out.lokr_w2": (4, 6)}, "out has tensors of several kinds: lora, lokr"),
        ({"out.lokr_w1": (2, 2), "out.lokr_w2": (4, 6), "out.dora_scale": (8, 1)}, r"a magnitude \(DoRA\) beside lokr"),
        ({**lora("out"), "conv.lokr_w1": (2, 2), "conv.lokr_w2": (3, 2, 3, 3)}, "adapters of several kinds: lokr, lora"),
        ({**lora("out"), "out.alpha": (2,)}, r"out\.alpha has the shape \[2\]; it should be one number"),
        ({**lora("out"), "out.dora_scale": (8, 1)}, "magnitude in ComfyUI's form, which the base weights are needed for"),
        ({"qkv.lokr_w1": (2, 2), "qkv.lokr_w2": (12, 6)}, "the LoKr of qkv .* can be neither moved nor divided"),
        ({**lora("qkv", rows=24), "qkv.dora_scale": (1, 12)}, "the DoRA of qkv has a magnitude of columns"),
    ],
)
def test_what_is_refused(shapes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_adapter(write(tmp_path / "x.safetensors", shapes), MODULES, TABLE)


def test_a_magnitude_of_columns_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", {**lora("out"), "out.dora_scale": (1, 12)})
    with pytest.raises(UserError, match=r"its magnitude \[1, 12\] is of columns, not of rows"):
        read_adapter(path, MODULES, TABLE, base=lambda name: Network().state_dict()[name])


def test_a_config_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "adapter_model.safetensors", lora("base_model.model.out"))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="its PEFT config, which tells the strength, cannot be read"):
        read_adapter(path, MODULES, TABLE)


def test_alpha_comes_before_a_config(tmp_path):
    save_file(
        {
            **{key: torch.ones(shape) for key, shape in lora("base_model.model.out").items()},
            "base_model.model.out.alpha": torch.tensor(1.0),
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    assert read_adapter(tmp_path / "adapter_model.safetensors", MODULES, TABLE).scales == {"out": 0.5}


def test_a_loha_of_a_fused_module_is_divided_by_rows(tmp_path):
    shapes = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 12), "hada_w2_a": (24, 2), "hada_w2_b": (2, 12)}
    path = write(tmp_path / "x.safetensors", {f"diffusion_model.qkv.{part}": shape for part, shape in shapes.items()})
    read = read_adapter(path, MODULES, TABLE)
    with safe_open(path, framework="pt") as file:
        whole = {part: file.get_tensor(f"diffusion_model.qkv.{part}") for part in shapes}
    expected = adapted(torch.zeros(24, 12), "loha", whole, 1.0)
    for index, module in enumerate(("to_q", "to_k", "to_v")):
        parts = {part: read.weights[f"{module}.{part}"] for part in shapes}
        torch.testing.assert_close(adapted(torch.zeros(8, 12), "loha", parts, 1.0), expected[8 * index : 8 * index + 8])


@pytest.mark.parametrize(
    ("kind", "fmt", "modules", "expected"),
    [
        ("lora", COMFY, MODULES, []),
        ("dora", COMFY, MODULES, []),
        ("dora", COMFY, ("to_q", "to_v", "out"), ["to_q", "to_v"]),  # k has no magnitude
        ("loha", COMFY, MODULES, ["to_q", "to_k", "to_v"]),
        ("lokr", COMFY, MODULES, ["to_q", "to_k", "to_v", "norm"]),  # rows that are moved
        ("dora", DIFFUSERS, MODULES, ["norm"]),
        ("lokr", DIFFUSERS, MODULES, []),
        ("lokr", LoraFormat("diffusion_model.", "released", unfused=DIFFUSERS), MODULES, []),
    ],
)
def test_what_a_format_cannot_hold(kind, fmt, modules, expected):
    assert unwritable(modules, kind, TABLE, fmt) == expected


def test_names_of_weights():
    names = ["a.b.lora_A.weight", "a.b.lora_B.weight", "a.b.lora_magnitude_vector.weight", "a.b.c.hada_w1_a", "d.lokr_w2"]
    assert [module_of(name) for name in names] == ["a.b", "a.b", "a.b", "a.b.c", "d"]
    assert modules_of(names) == ["a.b", "a.b.c", "d"]
    assert by_module(names)["a.b.c"] == {"hada_w1_a": "a.b.c.hada_w1_a"}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_ranks_are_those_of_the_weights(name):
    model = get_peft_model(Network(), CONFIGS[name])
    sizes = {module: part.weight.shape for module, part in Network().named_children()}
    weights = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    for module, names in by_module(weights).items():
        parts = {part.replace("vector", "vector.weight"): weights[key] for part, key in names.items()}
        assert problem_of(parts) is None
        adapter = Adapter(parts)
        assert adapter.rows == sizes[module][0]
        assert adapter.columns in (sizes[module][1], sizes[module][1] * 9)
        wanted = (CONFIGS[name].rank_pattern or {}).get(f"^{module}", CONFIGS[name].r)
        assert adapter.rank == wanted or (name.startswith("lokr") and adapter.rank is None and "lokr_w2" in parts)
        if name.startswith("lokr"):
            (rows, _), (other_rows, _) = factor_shapes(parts)
            assert rows * other_rows == sizes[module][0]
