"""Reading, filling and writing weights, with real files of each kind and a table that fuses and swaps."""

import json
import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from utils.errors import UserError
from utils.weights.keymap import Fuse, KeyMap, Rename, Transform
from utils.weights.named import (
    WeightSource,
    canonical_name,
    check_names,
    left_on_meta,
    materialise,
    save_safetensors,
    verify_safetensors,
)

MEBIBYTE = 2**20


def swap_halves(tensor):
    return torch.cat([tensor.chunk(2)[1], tensor.chunk(2)[0]])


def make_map():
    return KeyMap(
        [
            Rename("embed.{p}", "img_in.{p}"),
            Fuse("block.{i}.qkv.{p}", ("blocks.{i}.to_q.{p}", "blocks.{i}.to_k.{p}", "blocks.{i}.to_v.{p}")),
            Transform("norm_out.{p}", "final.{p}", swap_halves, swap_halves),
            Rename("step", "counter"),
            Transform("token", "cls", lambda tensor: tensor[None], lambda tensor: tensor.squeeze(0)),
        ],
        prefixes=("model.diffusion_model.",),
    )


def make_state(width=8):
    generator = torch.Generator().manual_seed(0)
    state = {"step": torch.tensor(7, dtype=torch.int64), "token": torch.randn(4, generator=generator)}
    for name in ("embed", "norm_out", *(f"blocks.{block}.to_{part}" for block in range(3) for part in "qkv")):
        state[f"{name}.weight"] = torch.randn(width, width, generator=generator).bfloat16()
        state[f"{name}.bias"] = torch.randn(width, generator=generator)
    return state


def released_file(folder, width=8):
    path = folder / "model.safetensors"
    save_file(make_map().to_released(make_state(width)), path)
    return path


def sharded(folder, save, ending):
    state, names = make_state(), sorted(make_state())
    shards = {f"diffusion_pytorch_model-0000{part}-of-00002.{ending}": names[part::2] for part in (0, 1)}
    for shard, part in shards.items():
        save({name: state[name] for name in part}, folder / shard)
    return shards


def with_index(folder, shards, ending):
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / f"diffusion_pytorch_model.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_shards_with_index(folder):
    save_file({"embed.weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    return with_index(folder, sharded(folder, save_file, "safetensors"), "safetensors")


def write_shards_without_index(folder):
    sharded(folder, save_file, "safetensors")
    return folder


def write_pickled_shards_with_index(folder):
    return with_index(folder, sharded(folder, torch.save, "bin"), "bin")


def write_pickled_parts(folder):
    sharded(folder, torch.save, "pth")
    return folder


def write_files_by_name(folder):
    return [folder / name for name in sharded(folder, torch.save, "pt")]


def write_nested_pickle(folder):
    torch.save({"state_dict": make_map().to_released(make_state())}, folder / "model.pth")
    return folder / "model.pth"


def write_beside_other_models(folder):
    save_file({"encoder.conv.weight": torch.zeros(1)}, folder / "vae.safetensors")
    torch.save({"shared.weight": torch.zeros(1)}, folder / "text_encoder.pth")
    released_file(folder)
    return folder


def write_checkpoint_with_prefix(folder):
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in make_map().to_released(make_state()).items()}
    save_file({**state, "vae.conv.weight": torch.zeros(1)}, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


WRITERS = [
    write_shards_with_index,
    write_shards_without_index,
    write_pickled_shards_with_index,
    write_pickled_parts,
    write_files_by_name,
    write_nested_pickle,
    write_beside_other_models,
    write_checkpoint_with_prefix,
    released_file,
]


@pytest.mark.parametrize("write", WRITERS)
def test_equal_weights_from_every_arrangement(write, tmp_path):
    source, state = WeightSource(write(tmp_path), make_map()), make_state()
    assert source.names() == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    for name, tensor in state.items():
        value = source.read(name)
        assert value.dtype == tensor.dtype
        assert torch.equal(value, tensor)
        assert value.untyped_storage().nbytes() == tensor.nbytes  # its own memory, not a view of something larger


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_dtypes_and_empty_tensors(dtype, tmp_path):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    save_file({"img_in.weight": values, "img_in.bias": values[:0]}, tmp_path / "model.safetensors")
    source = WeightSource(tmp_path / "model.safetensors", make_map())
    assert torch.equal(source.read("embed.weight").float(), values.float())
    assert source.read("embed.bias").shape == (0, 3)


@pytest.mark.parametrize("write", [released_file, write_nested_pickle])
def test_a_default_device_does_not_matter(write, tmp_path):
    path, expected = write(tmp_path), make_state()["embed.weight"]
    with torch.device("meta"):  # where models are made
        value = WeightSource(path, make_map()).read("embed.weight")
    assert torch.equal(value, expected)


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes with Linux' /proc")
def test_only_the_asked_tensors_and_rows_are_read(tmp_path):
    path = released_file(tmp_path, width=1024)
    before = bytes_read()
    source = WeightSource(path, make_map())
    assert bytes_read() - before < 64 * 1024 < path.stat().st_size / 100
    for name in ("embed.weight", "blocks.1.to_k.weight"):
        before = bytes_read()
        read = source.read(name).nbytes
        assert read == 2 * MEBIBYTE
        assert read <= bytes_read() - before < read + 4096


MEASURE = """
import sys
from pathlib import Path
import torch
from utils.weights.keymap import KeyMap, Rename
from utils.weights.named import WeightSource, materialise

def kibibytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

blocks, dtype, widths = 16, getattr(torch, sys.argv[2]), (1024, 1024, 1024, 1024, 4096, 4096)
with torch.device("meta"):
    model = torch.nn.ModuleList(
        torch.nn.ModuleList(torch.nn.Linear(1024, width, bias=False, dtype=dtype) for width in widths) for _ in range(blocks)
    )
before = kibibytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
source = WeightSource(Path(sys.argv[1]), KeyMap([Rename("{i}.{j}.weight", "block.{i}.{j}.weight")]))
materialise(model, [f"{i}.{j}.weight" for i in range(0, blocks, 2) for j in range(len(widths))], source, device="cpu")
print(kibibytes("VmHWM") - before, kibibytes("VmRSS") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory with Linux' /proc")
@pytest.mark.parametrize(
    ("ending", "dtype", "asked", "mapped"),
    [("safetensors", "bfloat16", 192, 0), ("pth", "bfloat16", 192, 64 + 8), ("safetensors", "float32", 384, 8)],
)
def test_host_memory_stays_near_what_is_asked_for(ending, dtype, asked, mapped, tmp_path, process_environment):
    """Half of 384 MiB of bf16 is asked for, in tensors of 2 and 8 MiB; of a pickled file up to 64 MiB are mapped at a time."""
    path = tmp_path / f"model.{ending}"
    widths = (1024, 1024, 1024, 1024, 4096, 4096)
    state = {f"block.{i}.{j}.weight": torch.zeros(w, 1024, dtype=torch.bfloat16) for i in range(16) for j, w in enumerate(widths)}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    command = [sys.executable, "-c", MEASURE, path, dtype]
    result = subprocess.run(command, capture_output=True, text=True, env=process_environment, check=True)
    peak, after = (int(number) / 1024 for number in result.stdout.split())
    assert asked - 2 < peak < asked + 8 + mapped + 24  # a little is Python's own
    assert after < asked + mapped + 24


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    torch.save({"embed.weight": Malicious(tmp_path / "was-run")}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth holds more than tensors.*can run any program.*\.safetensors"):
        WeightSource(tmp_path / "model.pth", make_map())
    assert not (tmp_path / "was-run").exists()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


def truncated_data(folder):
    path = released_file(folder)
    return cut(path, path.stat().st_size - 100)


def truncated_header(folder):
    return cut(released_file(folder), 200)


def web_page(folder):
    path = folder / "model.safetensors"
    path.write_text("<!DOCTYPE html><title>not found</title>")
    return path


def empty_file(folder):
    path = folder / "model.safetensors"
    path.touch()
    return path


def trailing_bytes(folder):
    path = released_file(folder)
    path.write_bytes(path.read_bytes() + b"more")
    return path


def header_without_json(folder):
    path = folder / "model.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"nope")
    return path


def truncated_pickle(folder):
    torch.save(make_state(), folder / "model.pth")
    return cut(folder / "model.pth", 3000)


def old_pickle(folder):
    torch.save(make_state(), folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def pickled_list(folder):
    torch.save([1, 2], folder / "model.pth")
    return folder / "model.pth"


def other_ending(folder):
    (folder / "model.gguf").touch()
    return folder / "model.gguf"


def index_with_a_missing_shard(folder):
    write_shards_with_index(folder)
    (folder / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    return folder


def damaged_index(folder):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weights": ')
    return folder


def same_weights_twice(folder):
    save_file(make_state(), folder / "a.safetensors")
    save_file(make_state(), folder / "b.safetensors")
    return folder


def other_family(folder):
    save_file({f"joint_blocks.{block}.x_block.attn.qkv.weight": torch.zeros(1) for block in range(9)}, folder / "sd3.safetensors")
    return folder / "sd3.safetensors"


def unknown_tensor(folder):
    save_file({**make_state(), "blocks.0.to_qq.weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def quantised(folder):
    save_file({**make_state(), "embed.weight": torch.zeros(8, 8, dtype=torch.int8)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def fused_rows_that_do_not_divide(folder):
    save_file({"block.0.qkv.weight": torch.zeros(7, 2)}, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", r"nothing does not exist"),
        (lambda folder: folder, r"holds no weights: no file in it ends in \.safetensors, \.pth, \.pt, \.bin"),
        (other_ending, r"model\.gguf is not a file of weights; its name should end in \.safetensors, \.pth"),
        (
            truncated_data,
            r"model\.safetensors has 2\d+ bytes; by its header it should have 2\d+: the download is incomplete\. Download",
        ),
        (
            truncated_header,
            r"model\.safetensors has 200 bytes; by its header it should have \d+ or more: the download is incomplete",
        ),
        (trailing_bytes, r"model\.safetensors has \d+ bytes; by its header it should have \d+: it is damaged"),
        (web_page, r"model\.safetensors is not a \.safetensors file \(size 39 bytes\)\. Download it again"),
        (empty_file, r"model\.safetensors is not a \.safetensors file \(size 0 bytes\)"),
        (header_without_json, r"model\.safetensors is not a \.safetensors file, or its header is damaged"),
        (truncated_pickle, r"model\.pth is not a whole file of torch\.save.*Download it again, or use"),
        (old_pickle, r"model\.pth is not a whole file of torch\.save in the zip format"),
        (pickled_list, r"model\.pth is not a table of named tensors"),
        (index_with_a_missing_shard, r"(?s)index\.json names files that are not there.*- .*diffusion_pytorch_model-00001-of-00002"),
        (damaged_index, r"index\.json is not an index of weights"),
        (same_weights_twice, r"a\.safetensors and .*b\.safetensors hold the same weights \(.* and 19 more\); name the file"),
        (
            other_family,
            r"sd3\.safetensors does not hold weights of this model\. It has 9 tensors such as joint_blocks\.0\.x_block"
            r".* and 4 more; expected are names such as embed\.weight.*\(diffusers\) or img_in\.weight.*\(original release\)",
        ),
        (unknown_tensor, r"(?s)does not have:.*blocks\.0\.to_qq\.weight \(the nearest known name is blocks\.0\.to_q\.weight\)"),
        (
            quantised,
            r"(?s)model\.safetensors is quantised .*use the model's bf16, fp16 or fp8 file.*embed\.weight is quantised to int8",
        ),
        (
            fused_rows_that_do_not_divide,
            r"model\.safetensors: block\.0\.qkv\.weight has the shape \[7, 2\]; its rows should be a multiple",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_files(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        WeightSource(make(tmp_path), make_map())


def test_a_file_cut_short_during_the_run(tmp_path):
    source = WeightSource(released_file(tmp_path), make_map())
    cut(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(UserError, match=r"model\.safetensors ended while img_in\.weight was read"):
        source.read("embed.weight")


def test_check_names(tmp_path):
    source = WeightSource(released_file(tmp_path), make_map())
    shapes = {name: tensor.shape for name, tensor in make_state().items()}
    assert check_names(source, shapes) == []
    expected = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.0")}
    expected |= {f"blocks.{block}.to_q.bias": (8,) for block in range(3, 10)} | {"embed.weight": (8, 4)}
    assert check_names(source, expected) == [
        "7 weights are missing: blocks.3.to_q.bias, blocks.4.to_q.bias, blocks.5.to_q.bias, blocks.6.to_q.bias, blocks.7.to_q.bias "
        "and 2 more",
        "1 weight is of another shape: embed.weight is [8, 8], the model's [8, 4]",
        "6 weights are not part of the model: blocks.0.to_q.bias, blocks.0.to_k.bias, blocks.0.to_v.bias, blocks.0.to_q.weight, "
        "blocks.0.to_k.weight and 1 more",
    ]
    with pytest.raises(UserError, match=r"other\.weight is not in .*model\.safetensors"):
        source.read("other.weight")


def test_fingerprint_follows_the_weights_not_the_place(tmp_path):
    def fingerprint(name, state):
        save_safetensors(tmp_path / name / "model.safetensors", state)
        return WeightSource(tmp_path / name, make_map()).fingerprint()

    state = make_state(width=1024)
    first = fingerprint("first", state)
    assert fingerprint("copy", state) == first
    for name in ("embed.weight", "norm_out.bias"):
        assert fingerprint(f"other-{name}", {**state, name: state[name] + 1}) != first
    assert fingerprint("dtype", {**state, "embed.bias": state["embed.bias"].view(torch.int32)}) != first
    assert fingerprint("names", {name: state[name] for name in state if name != "step"}) != first


class Net(nn.Module):
    """Named as ``make_state``, with tied weights, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({f"to_{part}": nn.Linear(8, 8) for part in "qkv"}) for _ in range(3))
        self.norm_out = nn.Linear(8, 8)
        self.tied = self.norm_out
        self.token = nn.Parameter(torch.zeros(4))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x):
        for block in self.blocks:
            x = block["to_q"](x) + block["to_k"](x) * block["to_v"](x)
        return self.tied(self.embed(x))


def meta_net():
    with torch.device("meta"):
        return Net()


def test_materialise_keeps_the_objects(tmp_path):
    net = meta_net()
    net.embed.weight.requires_grad_(False)
    net.embed.weight.learning_rate_group = "embedders"
    net.embed.to(torch.float64)
    held = dict(net.named_parameters())
    optimizer = torch.optim.SGD([held["norm_out.weight"]], lr=1.0)
    state = make_state()
    source = WeightSource(released_file(tmp_path), make_map())

    assert materialise(net, state, source, device="cpu") == []
    for name, parameter in net.named_parameters():
        assert parameter is held[name]
        assert type(parameter) is nn.Parameter
        assert parameter.dtype == (torch.float64 if name.startswith("embed") else torch.float32)
        assert torch.equal(parameter, state[name].to(parameter.dtype))
        assert parameter.requires_grad == (name != "embed.weight")
    assert held["embed.weight"].learning_rate_group == "embedders"
    assert net.tied.weight is net.norm_out.weight
    assert net.step == 7
    assert net.table.is_meta  # not in files: its maker's business

    net.float()(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.tied.weight, state["norm_out.weight"].float())


def test_materialise_fills_what_is_asked_for_and_tells_the_rest(tmp_path):
    net, state = meta_net(), make_state()
    names = [name for name in state if name.startswith("blocks.1")]
    left = materialise(net, names, WeightSource(released_file(tmp_path), make_map()), device="cpu")
    assert left == left_on_meta(net)
    assert set(left) == {*(name for name in state if name not in names), "tied.weight", "tied.bias"}

    stage = nn.ModuleDict({"layer": meta_net().blocks[1]})
    values = {name: state[name].float() for name in names}
    name_of = {f"layer.{name.removeprefix('blocks.1.')}": name for name in names}.__getitem__
    assert materialise(stage, names, values, device="cpu", name_of=name_of) == []
    with torch.no_grad():
        stage["layer"]["to_q"].bias.zero_()
    assert values["blocks.1.to_q.bias"].any()  # given tensors are copied


def test_materialise_refuses_before_it_fills(tmp_path):
    net = meta_net()
    net.embed = nn.Linear(4, 8, device="meta")
    save_file({name: tensor for name, tensor in make_state().items() if name != "step"}, tmp_path / "model.safetensors")
    source = WeightSource(tmp_path / "model.safetensors", make_map())
    with pytest.raises(UserError, match=r"(?s)1 weight is missing: step.*embed\.weight is \[8, 8\], the model's \[8, 4\]"):
        materialise(net, make_state(), source, device="cpu")
    assert all(parameter.is_meta for parameter in net.parameters())
    with pytest.raises(ValueError, match=r"the module has no other\.weight"):
        materialise(net, ["other.weight"], source, device="cpu")


def test_names_under_an_adapter(tmp_path):
    net = meta_net()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), net, low_cpu_mem_usage=True)
    state = make_state()
    left = materialise(net, state, WeightSource(released_file(tmp_path), make_map()), device="cpu")
    assert left == [f"blocks.{block}.to_{part}.lora_{side}.weight" for block in range(3) for part in "qv" for side in "AB"]
    assert torch.equal(net.blocks[0]["to_q"].base_layer.weight, state["blocks.0.to_q.weight"].float())
    assert [name for name, _ in net.named_parameters() if canonical_name(name) != name][:3] == [
        "blocks.0.to_q.base_layer.weight",
        "blocks.0.to_q.base_layer.bias",
        "blocks.0.to_q.lora_A.default.weight",
    ]


def test_saved_files_are_read_by_the_safetensors_library(tmp_path):
    tensors = {
        "strided": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
        "slice": torch.arange(12, dtype=torch.bfloat16)[3:7],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "eight bits": torch.arange(5).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "trained": nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "new folder" / "weights.safetensors"
    save_safetensors(path, tensors, {"modelspec.title": "Ünïcode", "a": "b"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"modelspec.title": "Ünïcode", "a": "b"}

    file = verify_safetensors(path)
    assert file.metadata == {"modelspec.title": "Ünïcode", "a": "b"}
    assert file.entries == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)  # others may read it if they may read anything


def test_equal_weights_make_equal_files(tmp_path):
    state = make_state()
    save_safetensors(tmp_path / "a.safetensors", state, {"a": "1", "b": "2"})
    save_safetensors(tmp_path / "b.safetensors", dict(reversed(state.items())), {"b": "2", "a": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


Refusal = namedtuple("Refusal", "tensors check error")


class Full(dict):
    """Fails at the second look at a tensor, when part of the file is written, as a full disk does."""

    def __getitem__(self, name):
        raise OSError(28, "No space left on device")


def refuse(path):
    assert verify_safetensors(path).entries
    raise UserError("a key is missing")


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(make_state(), refuse, UserError),
        Refusal(Full(make_state()), None, OSError),
        Refusal({"x": torch.zeros(1, dtype=torch.complex64)}, None, ValueError),
    ],
    ids=["check", "full disk", "dtype"],
)
def test_a_refused_file_leaves_the_old_one(refusal, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, {"x": torch.ones(1)})
    before = path.read_bytes()
    with pytest.raises(refusal.error):
        save_safetensors(path, refusal.tensors, check=refusal.check)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_verify_refuses_what_is_not_whole(tmp_path):
    path = released_file(tmp_path)
    with pytest.raises(UserError, match="the download is incomplete"):
        verify_safetensors(cut(path, path.stat().st_size - 1))
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        verify_safetensors(path)
