"""Wan's names against diffusers' own conversion, for tiny models by value and for the released sizes by name and shape."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from models.wan.keys import wan_key_map
from utils.weights.named import WeightSource, check_names

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
TINY_VARIANTS = {
    "t2v": TINY,
    "i2v": {**TINY, "in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24},
    "flf2v": {**TINY, "in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24, "pos_embed_seq_len": 514},
    "2.2-i2v": {**TINY, "in_channels": 36},
    "2.2-ti2v": {**TINY, "in_channels": 48, "out_channels": 48},
}
MIDDLE = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
REAL_VARIANTS = {
    "1.3B t2v": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 825),
    "14B t2v": (LARGE, 1095),
    "14B i2v": ({**LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 1303),
    "14B flf2v": (
        {**LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
        1304,
    ),
    "2.2 A14B i2v": ({**LARGE, "in_channels": 36}, 1095),
    "2.2 5B ti2v": ({**MIDDLE, "in_channels": 48, "out_channels": 48}, 825),
}
FIRST_LAST_FRAME = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}


def tiny_state(variant):
    torch.manual_seed(0)
    state = WanTransformer3DModel(**TINY_VARIANTS[variant]).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}  # some are zeros or ones at first


def by_diffusers(released):
    """Diffusers' conversion, which leaves the position embedding of first and last frame unconverted."""
    return {
        FIRST_LAST_FRAME.get(name, name): tensor for name, tensor in convert_wan_transformer_to_diffusers(dict(released)).items()
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_tiny_models_round_trip_and_agree_with_diffusers(variant):
    key_map, state = wan_key_map(), tiny_state(variant)
    released = key_map.to_released(state)
    assert_same(key_map.to_diffusers(released), state)
    assert_same(by_diffusers(released), state)
    assert key_map.layout_of(state) == "diffusers"
    assert key_map.layout_of(released) == "released"


@pytest.mark.parametrize("variant", REAL_VARIANTS)
def test_released_sizes_agree_with_diffusers(variant):
    config, count = REAL_VARIANTS[variant]
    with torch.device("meta"):
        state = WanTransformer3DModel(text_dim=4096, **{"in_channels": 16, **config}).state_dict()
    key_map = wan_key_map()
    released = key_map.to_released(state)
    assert len(released) == len(state) == count
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for back in (key_map.to_diffusers(released), by_diffusers(released)):
        assert {name: tensor.shape for name, tensor in back.items()} == shapes


def test_names_that_comfyui_looks_for():
    """What ComfyUI recognises a Wan file by, and the modules a LoRA is looked up under."""
    key_map = wan_key_map()
    assert {"head.modulation", "img_emb.proj.0.bias", "blocks.0.modulation"} <= key_map.to_released(tiny_state("i2v")).keys()
    assert [
        key_map.module_path(path) for path in ("blocks.3.attn1.to_out.0", "blocks.3.attn2.add_k_proj", "blocks.3.ffn.net.0.proj")
    ] == [
        "blocks.3.self_attn.o",
        "blocks.3.cross_attn.k_img",
        "blocks.3.ffn.0",
    ]


def write_diffusers_shards(folder, state):
    names = sorted(state)
    shards = {f"diffusion_pytorch_model-{part + 1:05d}-of-00003.safetensors": names[part::3] for part in range(3)}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_diffusers_model(folder, state):
    model = WanTransformer3DModel(**TINY_VARIANTS["i2v"])
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def write_release(folder, state):
    save_file(wan_key_map().to_released(state), folder / "diffusion_pytorch_model.safetensors")
    torch.save({"conv1.weight": torch.zeros(3)}, folder / "Wan2.1_VAE.pth")
    return folder


def write_release_parts(folder, state):
    released = wan_key_map().to_released(state)
    for part in range(2):
        torch.save({name: released[name] for name in sorted(released)[part::2]}, folder / f"part-{part}.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, folder / "Wan2.1_VAE.pth")
    return folder


def write_comfy_model(folder, state):
    save_file(wan_key_map().to_released(state), folder / "wan2.1_i2v.safetensors")
    return folder / "wan2.1_i2v.safetensors"


def write_comfy_checkpoint(folder, state):
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in wan_key_map().to_released(state).items()}
    save_file({**prefixed, "vae.conv1.weight": torch.zeros(3)}, folder / "all_in_one.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, folder / "wan_vae.safetensors")
    return folder


WRITERS = {
    write_diffusers_shards: "diffusers",
    write_diffusers_model: "diffusers",
    write_release: "released",
    write_release_parts: "released",
    write_comfy_model: "released",
    write_comfy_checkpoint: "released",
}


@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_gives_the_same_weights(write, tmp_path):
    state = tiny_state("i2v")
    source = WeightSource(write(tmp_path, state), wan_key_map())
    assert source.layout == WRITERS[write]
    assert check_names(source, {name: tensor.shape for name, tensor in state.items()}) == []
    assert_same({name: source.read(name) for name in source.names()}, state)
    assert not any("vae" in file.name.lower() for file in source.files)


def test_unused_norm_of_early_conversions_is_passed_over(tmp_path):
    state = tiny_state("i2v")
    save_file({**state, "blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, tmp_path / "model.safetensors")
    assert WeightSource(tmp_path / "model.safetensors", wan_key_map()).names().keys() == state.keys()
