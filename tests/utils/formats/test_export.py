"""Exported files against the programs that read them, and against everything that can go wrong while they are written."""

import hashlib
import json
import logging
import os
import re
import resource
import signal
import weakref
from collections.abc import Mapping

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.wan.keys import wan_key_map
from utils.errors import UserError
from utils.formats.adapter_files import read_adapter
from utils.formats.adapter_format import LoraFormat
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter, export_full
from utils.weights.keymap import Fuse, KeyMap, Rename, Transform

RANK, ALPHA = 4, 12.0
WAN = LoraFormat(prefix="diffusion_model.", names="released")
KOHYA = LoraFormat(prefix="lora_unet_", names="released", down="lora_down", up="lora_up", separator="_", writes_alpha=True)
FAMILY = {"modelspec.architecture": "wan2.1-i2v-14b", "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1"}
FACTS = TrainingFacts(
    step=12,
    epoch=2,
    samples=24,
    learning_rate=1e-4,
    seed=7,
    resolution="832x480",
    datasets={"/home/someone/secret/clips": 30, "/data/b/clips": 2, "relative/pictures": 5},
)
BLOCK_MODULES = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"


def wan(image=True):
    """A small random Wan, the same on every call."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=20 if image else 16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        image_dim=16 if image else None,
        added_kv_proj_dim=24 if image else None,
    )
    for parameter in model.parameters():  # zeros and ones would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).eval()


def output(model, image=True):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 20 if image else 16, 2, 8, 8, generator=generator),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 512, 16, generator=generator),
            encoder_hidden_states_image=torch.randn(1, 257, 16, generator=generator) if image else None,
        ).sample


def with_adapters(model, targets=BLOCK_MODULES):
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def adapter_weights(model):
    return {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def lora(folder, weights, name="run", **changes):
    arguments = {
        "expected": changes.get("expected") or shapes(weights),
        "key_map": wan_key_map(),
        "fmt": WAN,
        "scales": dict.fromkeys(modules_of(changes.get("expected") or weights), changes.pop("alpha", ALPHA) / RANK),
        "dtype": torch.float32,
        "family": FAMILY,
        "facts": FACTS,
        **changes,
    }
    return export_adapter(folder, name, weights, **arguments)


def full(folder, weights, name="run", **changes):
    arguments = {
        "expected": changes.get("expected") or shapes(weights),
        "key_map": wan_key_map(),
        "dtype": torch.float32,
        "family": FAMILY,
        "facts": FACTS,
        **changes,
    }
    return export_full(folder, name, weights, **arguments)


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def only_file(folder):
    [path] = folder.iterdir()
    return path


# --- LoRA ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [True, False], ids=["i2v", "t2v"])
def test_diffusers_reads_a_lora_whole_and_at_the_trained_strength(image, tmp_path, caplog):
    trained = with_adapters(wan(image))
    path = lora(tmp_path, adapter_weights(trained))

    fresh = wan(image)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=fresh
    )
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(path)
    assert not caplog.records, caplog.text
    adapted = [name for name, module in fresh.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == [name for name, module in trained.named_modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 2 * (12 if image else 10)

    expected = output(trained, image)
    assert (expected - output(wan(image), image)).abs().max() > 0.1
    assert (output(fresh, image) - expected).abs().max() <= 1e-5


def test_keys_are_those_that_comfyui_reads(tmp_path):
    keys = set(load_file(lora(tmp_path, adapter_weights(with_adapters(wan())))))
    block = {"self_attn": ("q", "k", "v", "o"), "cross_attn": ("q", "k", "v", "o", "k_img", "v_img")}
    modules = [f"{attention}.{part}" for attention, parts in block.items() for part in parts] + ["ffn.0", "ffn.2"]
    assert keys == {
        f"diffusion_model.blocks.{index}.{module}.lora_{side}.weight" for index in (0, 1) for module in modules for side in "AB"
    }


def test_scale_is_multiplied_in_fp32_before_the_cast(tmp_path):
    weights = adapter_weights(with_adapters(wan()))
    tensors = load_file(lora(tmp_path, weights, alpha=1.7, dtype=torch.bfloat16))
    up = weights["blocks.0.attn1.to_q.lora_B.weight"]
    assert torch.equal(tensors["diffusion_model.blocks.0.self_attn.q.lora_B.weight"], (up * (1.7 / RANK)).bfloat16())
    down = weights["blocks.0.attn1.to_q.lora_A.weight"]
    assert torch.equal(tensors["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], down.bfloat16())


@pytest.mark.parametrize("fmt", [WAN, KOHYA, LoraFormat(prefix="transformer.", names="diffusers", writes_alpha=True)])
def test_our_reader_gives_back_what_was_written(fmt, tmp_path):
    """Every linear and convolution, in each naming; with `.alpha` or without, the strength is that of the training."""
    modules = [name for name, module in wan().named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)]
    trained = with_adapters(wan(), targets="|".join(map(re.escape, modules)))
    weights = adapter_weights(trained)
    path = lora(tmp_path, weights, fmt=fmt)
    read = read_adapter(path, modules, wan_key_map())
    assert read.weights.keys() == weights.keys()
    assert set(read.scales.values()) == {1.0}
    assert read.metadata["ss_network_alpha"] == "12"
    for name, tensor in weights.items():
        expected = tensor * (ALPHA / RANK) if "lora_B" in name else tensor
        torch.testing.assert_close(read.weights[name], expected)
    assert any(key.endswith(".alpha") for key in load_file(path)) == fmt.writes_alpha


def test_alpha_of_another_trainers_file_is_read(tmp_path):
    prefix = "lora_unet_blocks_1_ffn_2"
    tensors = {f"{prefix}.lora_down.weight": torch.ones(8, 32), f"{prefix}.lora_up.weight": torch.ones(24, 8)}
    save_file({**tensors, f"{prefix}.alpha": torch.tensor(2.0)}, tmp_path / "other.safetensors")
    read = read_adapter(tmp_path / "other.safetensors", ["blocks.1.ffn.net.2", "blocks.0.ffn.net.2"], wan_key_map())
    assert read.scales == {"blocks.1.ffn.net.2": 0.25}
    assert shapes(read.weights) == {"blocks.1.ffn.net.2.lora_A.weight": (8, 32), "blocks.1.ffn.net.2.lora_B.weight": (24, 8)}


SWAPPED = KeyMap(
    [
        Fuse("qkv.{p}", ("to_q.{p}", "to_k.{p}", "to_v.{p}")),
        Transform("norm.{p}", "mod.{p}", forward=lambda w: w.roll(2, 0), inverse=lambda w: w.roll(-2, 0)),
        Rename("out.{p}", "proj.{p}"),
    ]
)


def test_a_module_whose_rows_the_release_moves(tmp_path):
    weights = {"norm.lora_A.weight": torch.randn(RANK, 3), "norm.lora_B.weight": torch.randn(4, RANK)}
    path = lora(tmp_path, weights, key_map=SWAPPED, alpha=RANK)
    tensors = load_file(path)
    assert torch.equal(tensors["diffusion_model.mod.lora_B.weight"], weights["norm.lora_B.weight"].roll(2, 0))
    assert torch.equal(tensors["diffusion_model.mod.lora_A.weight"], weights["norm.lora_A.weight"])
    read = read_adapter(path, ["norm", "out", "to_q"], SWAPPED)
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in weights.items())


def test_a_lora_on_a_fused_module_is_read_for_each_part(tmp_path):
    down, up = torch.randn(RANK, 3), torch.randn(6, RANK)
    save_file({"qkv.lora_A.weight": down, "qkv.lora_B.weight": up}, tmp_path / "fused.safetensors")
    read = read_adapter(tmp_path / "fused.safetensors", ["to_q", "to_k", "to_v", "out"], SWAPPED)
    for index, module in enumerate(("to_q", "to_k", "to_v")):
        delta = read.weights[f"{module}.lora_B.weight"] @ read.weights[f"{module}.lora_A.weight"]
        assert torch.equal(delta, (up @ down)[2 * index : 2 * index + 2])


ATTENTION = KeyMap(
    [
        Fuse("attn.qkv_mlp.{p}", ("to_q.{p}", "to_k.{p}", "to_v.{p}", "mlp.{p}"), shares=(1, 1, 1, 4)),
        Rename("out.{p}", "attn.proj.{p}"),
    ]
)
ROWS = {"to_q": 5, "to_k": 5, "to_v": 5, "mlp": 20, "out": 6}


def adapters(*modules, kernel=()):
    torch.manual_seed(3)
    return {
        f"{module}.lora_{side}.weight": torch.randn(*shape)
        for module in modules
        for side, shape in (("A", (RANK, 7, *kernel)), ("B", (ROWS[module], RANK, *(1 for _ in kernel))))
    }


def delta(weights, module):
    """What an adapter adds to the weight, without the scale."""
    return torch.tensordot(weights[f"{module}.lora_B.weight"].flatten(1), weights[f"{module}.lora_A.weight"], dims=1)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("fmt", [WAN, KOHYA], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("modules", [("to_q", "to_k", "to_v", "mlp", "out"), ("mlp", "to_k"), ("to_v",)], ids=" ".join)
def test_adapters_of_a_fused_module_become_one(modules, fmt, kernel, tmp_path):
    """It changes the released weight by what the adapters change its parts, and is taken apart again, with its own ranks."""
    weights = adapters(*modules, kernel=kernel)
    path = lora(tmp_path, weights, key_map=ATTENTION, fmt=fmt)
    tensors = load_file(path)
    fused = fmt.key("attn.qkv_mlp", "")
    count = len(set(modules) - {"out"})
    down, up = tensors[f"{fused}{fmt.down}.weight"], tensors[f"{fused}{fmt.up}.weight"]
    assert down.shape == (count * RANK, 7, *kernel)
    assert up.shape == (35, count * RANK, *(1 for _ in kernel))
    assert (f"{fused}alpha" in tensors) == fmt.writes_alpha
    assert not fmt.writes_alpha or tensors[f"{fused}alpha"] == count * RANK, "so that its reader applies strength 1"
    parts = {
        module: delta(weights, module) * (ALPHA / RANK) if module in modules else torch.zeros(ROWS[module], 7, *kernel)
        for module in ROWS
    }
    expected = ATTENTION.to_released({f"{module}.weight": part for module, part in parts.items()})["attn.qkv_mlp.weight"]
    torch.testing.assert_close(torch.tensordot(up.flatten(1), down, dims=1), expected)

    read = read_adapter(path, ["out", "to_v", "mlp", "to_q", "to_k"], ATTENTION)  # in whatever order
    assert read.weights.keys() == weights.keys()
    assert read.scales == dict.fromkeys(modules, 1.0)
    for name, tensor in weights.items():
        assert torch.equal(read.weights[name], tensor * (ALPHA / RANK) if "lora_B" in name else tensor)


def test_adapters_of_other_ranks_and_scales_become_one(tmp_path):
    """Each at its own strength; taken apart again, each has its own rank."""
    torch.manual_seed(4)
    ranks, scales = {"to_q": 4, "to_k": 1, "mlp": 3}, {"to_q": 0.5, "to_k": 3.0, "mlp": 1.25}
    weights = {}
    for module, rank in ranks.items():
        weights[f"{module}.lora_A.weight"] = torch.randn(rank, 7)
        weights[f"{module}.lora_B.weight"] = torch.randn(ROWS[module], rank)
    path = lora(tmp_path, weights, key_map=ATTENTION, fmt=KOHYA, scales=scales)
    assert load_file(path)["lora_unet_attn_qkv_mlp.lora_down.weight"].shape == (8, 7)
    read = read_adapter(path, ROWS, ATTENTION)
    assert {module: len(read.weights[f"{module}.lora_A.weight"]) for module in read.scales} == ranks
    for module in ranks:
        torch.testing.assert_close(delta(read.weights, module), scales[module] * delta(weights, module))
    told = metadata(path)
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "2")


def test_the_scale_of_a_fused_adapter_is_by_its_whole_rank(tmp_path):
    weights = adapters("to_q", "to_k", "to_v", "mlp")
    tensors = load_file(lora(tmp_path, weights, key_map=ATTENTION, fmt=KOHYA))
    tensors["lora_unet_attn_qkv_mlp.alpha"] /= 2
    save_file(tensors, tmp_path / "half.safetensors")
    read = read_adapter(tmp_path / "half.safetensors", ROWS, ATTENTION)
    assert read.scales == dict.fromkeys(("to_q", "to_k", "to_v", "mlp"), 0.5)


def test_a_fused_adapter_that_still_has_only_zeros_is_read_for_each_part(tmp_path):
    weights = {name: tensor * ("lora_A" in name) for name, tensor in adapters("to_q", "to_k").items()}
    read = read_adapter(lora(tmp_path, weights, key_map=ATTENTION), ROWS, ATTENTION)
    assert {name.partition(".")[0] for name in read.weights} == {"to_q", "to_k", "to_v", "mlp"}
    assert all(delta(read.weights, module).eq(0).all() for module in ("to_q", "to_k", "to_v", "mlp"))


def test_a_module_with_two_adapters(tmp_path):
    both = {
        f"{module}.lora_{side}.weight": torch.ones(rows if side == "B" else RANK, RANK)
        for module, rows in (("attn.qkv_mlp", 35), ("diffusion_model.to_q", 5))
        for side in "AB"
    }
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="to_q has more than one adapter"):
        read_adapter(tmp_path / "both.safetensors", ROWS, ATTENTION)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.blocks.0.ffn.7.lora_A.weight": (4, 8)}, "ffn.7.lora_A.weight belongs to no module of the model"),
        ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": (4, 8)}, "blocks.0.ffn.net.0.proj has no lora_B.weight"),
        (
            {"blocks.0.ffn.0.lora_A.weight": (4, 8), "blocks.0.ffn.0.lora_B.weight": (8, 5)},
            r"do not fit together: \[4, 8\] and \[8, 5\]",
        ),
        ({"blocks.0.ffn.0.weight": (4, 8)}, "belongs to no module"),
        ({}, "it holds no adapter"),
    ],
)
def test_what_is_no_lora_of_this_model(tensors, message, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(UserError, match=message):
        read_adapter(path, ["blocks.0.ffn.net.0.proj"], wan_key_map())


def test_a_lora_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.safetensors cannot be read: No such file"):
        read_adapter(tmp_path / "nothing.safetensors", [], wan_key_map())
    cut = tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(100)}, cut)
    os.truncate(cut, cut.stat().st_size - 8)
    with pytest.raises(UserError, match="incomplete"):
        read_adapter(cut, [], wan_key_map())


# --- the whole model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [True, False], ids=["i2v", "t2v"])
def test_a_full_export_is_the_released_layout(image, tmp_path):
    """Read by the safetensors library, named as diffusers expects of the release, and the same model again."""
    model = wan(image)
    path = full(tmp_path, model.state_dict())
    released = load_file(path)
    assert "head.modulation" in released
    assert "blocks.1.cross_attn.norm_q.weight" in released
    again = convert_wan_transformer_to_diffusers(dict(released))
    assert again.keys() == model.state_dict().keys()
    other = wan(image)
    torch.nn.init.zeros_(other.proj_out.weight)
    other.load_state_dict(again)
    assert torch.equal(output(other, image), output(model, image))


def test_diffusers_loads_a_full_export_as_a_single_file(tmp_path):
    model = wan()
    path = full(tmp_path, model.state_dict())
    model.save_config(tmp_path / "config")
    loaded = WanTransformer3DModel.from_single_file(path, config=str(tmp_path / "config"), torch_dtype=torch.float32)
    # Not bit-equal: diffusers maps the file, so its tensors are aligned otherwise in memory and some sums have another order.
    assert (output(loaded.eval()) - output(model)).abs().max() <= 1e-5


def test_dtype_of_a_full_export(tmp_path):
    weights = {**wan().state_dict()}
    weights["proj_out.weight"] = weights["proj_out.weight"].bfloat16()
    own = load_file(full(tmp_path, weights, dtype=None))
    assert {own["head.head.weight"].dtype, own["head.modulation"].dtype} == {torch.bfloat16, torch.float32}
    cast = load_file(full(tmp_path, weights, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}


class OneAtATime(Mapping):
    """Weights that are made when asked for, and how many of them are alive."""

    def __init__(self, sizes, fail_at=None):
        self.sizes, self.fail_at, self.alive, self.most, self.reads = sizes, fail_at, weakref.WeakSet(), 0, 0

    def __getitem__(self, name):
        self.reads += 1
        if name == self.fail_at and self.reads > len(self.sizes):  # at the second reading: the file is half written
            raise OSError(5, "Input/output error")
        tensor = torch.full(self.sizes[name], float(len(name)))
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.sizes)

    def __len__(self):
        return len(self.sizes)


def test_a_full_export_holds_one_tensor_at_a_time(tmp_path):
    weights = OneAtATime(shapes(wan().state_dict()))
    path = full(tmp_path, weights, expected=weights.sizes)
    assert weights.most <= 2, "more than the one being written and the one being made"
    assert weights.reads == 2 * len(weights)
    assert len(load_file(path)) == len(weights)


def test_fused_and_moved_tensors_of_a_full_export(tmp_path):
    weights = {f"to_{part}.weight": torch.randn(2, 3) for part in "qkv"} | {"norm.bias": torch.arange(4.0)}
    released = load_file(full(tmp_path, weights, key_map=SWAPPED))
    assert torch.equal(released["qkv.weight"], torch.cat([weights[f"to_{part}.weight"] for part in "qkv"]))
    assert released["mod.bias"].tolist() == [2.0, 3.0, 0.0, 1.0]


# --- what is told of the training ----------------------------------------------------------------------------------------------


def test_metadata(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    path = lora(tmp_path, adapter_weights(with_adapters(wan())), name="my run")
    told = metadata(path)
    assert {
        key: value for key, value in told.items() if key.startswith("modelspec.") and "hash" not in key and "date" not in key
    } == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "wan2.1-i2v-14b/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": "my run",
        "modelspec.resolution": "832x480",
    }
    assert told["modelspec.date"].endswith("+00:00")
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_network_module"]) == ("4", "12", "networks.lora")
    assert (told["ss_steps"], told["ss_epoch"], told["ss_seed"], told["ss_learning_rate"]) == ("12", "2", "7", "0.0001")
    assert json.loads(told["ss_dataset_dirs"]) == {"clips": {"img_count": 32}, "pictures": {"img_count": 5}}
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert told["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[start:]).hexdigest()


@pytest.mark.parametrize("export", ["lora", "full"])
def test_no_path_user_or_host_is_told(export, tmp_path):
    path = lora(tmp_path, adapter_weights(with_adapters(wan()))) if export == "lora" else full(tmp_path, wan().state_dict())
    header = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")].decode(errors="replace")
    for private in ("/home", "/data", "someone", "secret", "relative", str(tmp_path), os.uname().nodename, f".{os.getpid()}."):
        assert private not in header.replace("https://", "")


def test_the_same_weights_make_the_same_tensors(tmp_path):
    weights = adapter_weights(with_adapters(wan()))
    first, second = (metadata(lora(tmp_path / name, weights, name=name)) for name in ("a", "b"))
    assert first["modelspec.hash_sha256"] == second["modelspec.hash_sha256"]
    changed = {**weights, "blocks.0.ffn.net.2.lora_B.weight": weights["blocks.0.ffn.net.2.lora_B.weight"] + 1}
    assert metadata(lora(tmp_path, changed))["modelspec.hash_sha256"] != first["modelspec.hash_sha256"]


# --- what goes wrong -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def older(tmp_path):
    """A good export of the same name, and its bytes: whatever goes wrong, it stays."""
    path = lora(tmp_path, adapter_weights(with_adapters(wan())))
    return path, path.read_bytes()


def assert_unharmed(older, folder):
    path, content = older
    assert only_file(folder) == path, "something was left behind"
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.0.ffn.net.2.lora_B.weight"), "blocks.0.ffn.net.2.lora_B.weight is missing"),
        (lambda w: w.update({"blocks.9.x.lora_A.weight": torch.zeros(4, 4)}), "blocks.9.x.lora_A.weight is not a weight"),
        (
            lambda w: w["blocks.1.attn1.to_v.lora_A.weight"][0, :1].fill_(float("nan")),
            r"diffusion_model\.blocks\.1\.self_attn\.v\.lora_A\.weight holds values that are not finite",
        ),
        (
            lambda w: w.update({"blocks.1.attn1.to_v.lora_A.weight": torch.zeros(4, 5)}),
            r"blocks\.1\.self_attn\.v\.lora_A\.weight has the shape \[4, 5\], it should have \[4, 24\]",
        ),
        (lambda w: w.update({"blocks.1.attn1.to_v.lora_A.weight": torch.zeros(5, 24)}), "attn1.to_v has matrices that do not fit"),
    ],
    ids=["missing", "unknown", "not finite", "misshapen", "other rank"],
)
def test_a_bad_lora_gets_no_name(change, message, older, tmp_path):
    weights = {name: tensor.clone() for name, tensor in adapter_weights(with_adapters(wan())).items()}
    expected = shapes(weights)
    change(weights)
    with pytest.raises(UserError, match=message):
        lora(tmp_path, weights, expected=expected)
    assert_unharmed(older, tmp_path)


def test_values_that_the_cast_makes_infinite(older, tmp_path):
    weights = {name: tensor * 1e6 for name, tensor in adapter_weights(with_adapters(wan())).items()}
    with pytest.raises(UserError, match=r"(?s)not finite.*and \d+ more"):
        lora(tmp_path, weights, dtype=torch.float16)
    assert_unharmed(older, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_found(value, dtype, tmp_path):
    for place in (0, 17, 2 * RANK * 3 - 1):
        weights = {"out.lora_A.weight": torch.randn(RANK, 6), "out.lora_B.weight": torch.randn(6, RANK)}
        weights["out.lora_A.weight"].view(-1)[place] = value
        with pytest.raises(UserError, match=r"proj\.lora_A\.weight holds values that are not finite"):
            lora(tmp_path, weights, key_map=SWAPPED, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export(tmp_path):
    with pytest.raises(UserError, match="there are no weights"):
        lora(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_read_to_the_end(older, tmp_path):
    sizes = shapes(wan().state_dict())
    with pytest.raises(UserError, match="Input/output error"):
        full(tmp_path, OneAtATime(sizes, fail_at="proj_out.weight"), expected=sizes)
    assert_unharmed(older, tmp_path)


def test_a_full_disk(older, tmp_path):
    """A limit on the size of files fails the write halfway, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(
            UserError, match=r"run\.safetensors was not exported: File too large; a file that was there is unchanged"
        ):
            full(tmp_path, wan().state_dict())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_unharmed(older, tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "exports").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="was not exported"):
        lora(tmp_path / "exports", adapter_weights(with_adapters(wan())))


def test_an_older_export_is_replaced(older, tmp_path):
    weights = {name: tensor + 1 for name, tensor in adapter_weights(with_adapters(wan())).items()}
    assert lora(tmp_path, weights) == only_file(tmp_path)
    assert only_file(tmp_path).read_bytes() != older[1]
