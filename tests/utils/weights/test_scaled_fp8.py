"""Weights stored in fp8, with scales and without, against the product computed by hand; and what is not read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.weights.keymap import Fuse, KeyMap, Rename
from utils.weights.named import WeightSource

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]
ADVICE = r"use the model's bf16, fp16 or fp8 file"


def make_map():
    return KeyMap(
        [Rename("embed.{p}", "img_in.{p}"), Fuse("qkv.{p}", ("to_q.{p}", "to_k.{p}", "to_v.{p}"))],
        prefixes=("model.diffusion_model.",),
    )


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def as_bytes(told):
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def opened(folder, tensors, metadata=None):
    save_file(tensors, folder / "model.safetensors", metadata)
    return WeightSource(folder / "model.safetensors", make_map())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_fp8_loses_nothing(kind, tmp_path):
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    every = every[every.float().isfinite()].view(-1, 2)
    source = opened(tmp_path, {"img_in.weight": every, "img_in.bias": every[:, 0].clone()})
    assert torch.equal(source.read("embed.weight").float(), every.float())
    assert torch.equal(source.read("embed.bias").float(), every[:, 0].float())
    assert source.names()["embed.weight"] == (tuple(every.shape), source.read("embed.weight").dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_a_fused_weight_takes_its_part_of_the_scale(kind, name, shape, tmp_path):
    stored, scale = normal(6, 4).to(kind), normal(*shape).abs() + 0.5
    source = opened(tmp_path, {"qkv.weight": stored, f"qkv.{name}": scale, "qkv.bias": normal(6)})
    expected = stored.float() * (scale if scale.numel() == 1 else scale.view(6, 1))
    for place, part in enumerate("qkv"):
        value = source.read(f"to_{part}.weight")
        assert value.dtype is torch.float32
        assert torch.equal(value, expected[2 * place : 2 * place + 2])
        assert torch.equal(source.read(f"to_{part}.bias"), normal(6)[2 * place : 2 * place + 2])


def test_marks_and_scales_of_inputs_are_no_weights(tmp_path):
    prefix = "model.diffusion_model."
    tensors = {
        f"{prefix}scaled_fp8": torch.zeros(2, dtype=KINDS[0]),
        f"{prefix}img_in.weight": normal(2, 2).to(KINDS[0]),
        f"{prefix}img_in.scale_weight": torch.tensor(3.0),
        f"{prefix}img_in.scale_input": torch.tensor(1.0),
        "vae.encoder.weight": normal(2, 2),
    }
    source = opened(tmp_path, tensors)
    assert list(source.names()) == ["embed.weight"]
    assert torch.equal(source.read("embed.weight"), 3 * normal(2, 2).to(KINDS[0]).float())
    torch.save(tensors, tmp_path / "model.pth")
    assert torch.equal(WeightSource(tmp_path / "model.pth", make_map()).read("embed.weight"), source.read("embed.weight"))


def test_another_scale_is_another_fingerprint(tmp_path):
    stored = {"img_in.weight": normal(2, 2).to(KINDS[0])}
    first = opened(tmp_path, {**stored, "img_in.weight_scale": torch.tensor(1.0)}).fingerprint()
    assert opened(tmp_path, {**stored, "img_in.weight_scale": torch.tensor(2.0)}).fingerprint() != first


WEIGHT = {"img_in.weight": normal(4, 4).to(KINDS[0])}
INT8 = {"img_in.weight": torch.zeros(4, 4, dtype=torch.int8)}
REFUSED = {
    "int8": (INT8, {}, rf"{ADVICE}.*img_in\.weight is quantised to int8"),
    "named int8": (
        INT8 | {"img_in.comfy_quant": as_bytes({"format": "int8_tensorwise"}), "img_in.weight_scale": torch.ones(())},
        {},
        rf"{ADVICE}.*img_in is quantised as int8_tensorwise",
    ),
    "mxfp8": (
        WEIGHT | {"img_in.weight_scale": torch.ones(4, 1)},
        {"_quantization_metadata": json.dumps({"layers": {"img_in": {"format": "mxfp8"}}})},
        rf"{ADVICE}.*img_in is quantised as mxfp8",
    ),
    "nvfp4": (
        {"img_in.weight": torch.zeros(4, 2, dtype=torch.uint8), "img_in.weight_scale_2": torch.ones(())},
        {},
        rf"{ADVICE}.*img_in\.weight_scale_2 belongs to a quantisation that is not read",
    ),
    "nf4": (
        {"img_in.weight": torch.zeros(8, 1, dtype=torch.uint8), "img_in.weight.absmax": torch.ones(1)},
        {},
        rf"{ADVICE}.*img_in\.weight\.absmax belongs to a quantisation",
    ),
    "blocks": (WEIGHT | {"img_in.weight_scale": torch.ones(2, 2)}, {}, r"has the shape \[2, 2\], which is neither .* 4 rows"),
    "no weight": (WEIGHT | {"qkv.weight_scale": torch.ones(())}, {}, r"qkv\.weight_scale: there is no qkv\.weight"),
    "no scale": (WEIGHT | {"img_in.comfy_quant": as_bytes({"format": "float8_e4m3fn"})}, {}, r"img_in: .* weight_scale is missing"),
    "no format": (WEIGHT | {"img_in.comfy_quant": as_bytes({"kind": 1})}, {}, "does not say how its weights are quantised"),
    "no JSON": (WEIGHT, {"_quantization_metadata": "fp8"}, "does not say how its weights are quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_with_advice(case, tmp_path):
    tensors, metadata, message = REFUSED[case]
    with pytest.raises(UserError, match=rf"(?s)model\.safetensors.*{message}"):
        opened(tmp_path, tensors, metadata)


def test_gguf_is_refused_with_advice(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"GGUF files are quantised; {ADVICE}"):
        WeightSource(tmp_path / "model.gguf", make_map())
