"""SD3's names against diffusers' own conversion, for tiny models by value and for the released sizes by name and shape."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.sd3 import sizes
from models.sd3.keys import sd3_key_map
from models.sd3.networks import Sd3Weights
from utils.weights.named import check_names
from utils.weights.tensor_files import TensorInfo

TINY = {
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 24,
    "in_channels": 16,
}
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
REAL = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
RMS = {"qk_norm": "rms_norm"}
TINY_VARIANTS = {
    "sd3-medium": TINY,
    "sd35-large": {**TINY, **RMS},
    "sd35-medium": {**TINY, **RMS, "dual_attention_layers": (0, 1)},
}
REAL_VARIANTS = {
    # And the number of the release's tensors: 17 around the blocks; in a block 20, in the last one 14; 4 norms of queries and keys;
    # 6 for a second attention.
    "sd3-medium": ({**REAL, **MEDIUM}, 17 + 23 * 20 + 14),
    "sd35-large": ({**REAL, **LARGE, **RMS}, 17 + 37 * 20 + 14 + 38 * 4),
    "sd35-medium": (
        {**REAL, **MEDIUM, **RMS, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
        17 + 23 * 20 + 14 + 24 * 4 + 13 * 6,
    ),
}


def tiny_state(variant):
    torch.manual_seed(0)
    state = SD3Transformer2DModel(**TINY_VARIANTS[variant]).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_tiny_models_round_trip_and_agree_with_diffusers(variant):
    key_map, state = sd3_key_map(blocks=3), tiny_state(variant)
    released = key_map.to_released(state)
    assert_same(key_map.to_diffusers(released), state)
    assert_same(convert_sd3_transformer_checkpoint_to_diffusers(dict(released)), state)
    assert key_map.layout_of(state) == "diffusers"
    assert key_map.layout_of(released) == "released"


@pytest.mark.parametrize("variant", REAL_VARIANTS)
def test_released_sizes_agree_with_diffusers(variant):
    config, count = REAL_VARIANTS[variant]
    with torch.device("meta"):
        module = SD3Transformer2DModel(**config)
    state = module.state_dict()
    key_map = sd3_key_map(config["num_layers"])
    released = key_map.to_released(state)
    assert len(released) == count
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for back in (key_map.to_diffusers(released), convert_sd3_transformer_checkpoint_to_diffusers(dict(released))):
        assert {name: tensor.shape for name, tensor in back.items()} == shapes

    names = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    read = sizes.transformer_config(names, None)
    assert read == {name: module.config[name] for name in read}
    assert sizes.variant_of(read) == variant


def test_names_that_comfyui_looks_for():
    """What ComfyUI recognises an SD3 file and its kind by."""
    released = sd3_key_map(blocks=3).to_released(tiny_state("sd35-medium"))
    assert released["joint_blocks.0.context_block.attn.qkv.weight"].shape == (96, 32)
    assert released["pos_embed"].shape == (1, 24 * 24, 32)
    assert {"joint_blocks.0.context_block.attn.ln_q.weight", "joint_blocks.1.x_block.attn2.qkv.weight"} <= released.keys()
    assert "joint_blocks.2.x_block.attn2.qkv.weight" not in released
    assert "joint_blocks.2.context_block.mlp.fc1.weight" not in released


def test_only_the_last_text_norm_and_the_head_have_their_rows_swapped():
    state = tiny_state("sd3-medium")
    released = sd3_key_map(blocks=3).to_released(state)
    for block, rows in ((0, 192), (1, 192), (2, 64)):
        ours = state[f"transformer_blocks.{block}.norm1_context.linear.weight"]
        theirs = released[f"joint_blocks.{block}.context_block.adaLN_modulation.1.weight"]
        assert len(ours) == rows
        assert torch.equal(theirs, ours.roll(32, 0) if block == 2 else ours)
    assert torch.equal(released["final_layer.adaLN_modulation.1.bias"], state["norm_out.linear.bias"].roll(32, 0))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_files_are_read_without_knowing_the_number_of_blocks(variant, prefix, tmp_path):
    state = tiny_state(variant)
    released = sd3_key_map(blocks=3).to_released(state)
    others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    save_file({**{prefix + name: tensor for name, tensor in released.items()}, **others}, tmp_path / "model.safetensors")
    source = Sd3Weights(tmp_path / "model.safetensors", sd3_key_map(blocks=1))
    assert check_names(source, {name: tensor.shape for name, tensor in state.items()}) == []
    assert_same({name: source.read(name) for name in source.names()}, state)
