"""FLUX.2's names against diffusers' own conversion, by value for tiny models and by name and shape for the released sizes."""

import pytest
import torch
from diffusers import AutoencoderKL, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers, convert_ldm_vae_checkpoint

from models.flux2.encoder_keys import vae_key_map
from models.flux2.keys import flux2_key_map

REAL_SIZES = {
    "dev": ({"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}, True, 8, 48),
    "klein 9B": ({"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}, False, 8, 24),
    "klein 4B": ({"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}, False, 5, 20),
}


def expected_names(doubles, singles, guidance):
    """The release's own names, as its ``model.py`` makes them."""
    names = ["img_in", "txt_in", "time_in.in_layer", "time_in.out_layer"]
    names += ["guidance_in.in_layer", "guidance_in.out_layer"] if guidance else []
    names += ["double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin"]
    names += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for block in (f"double_blocks.{index}.{side}" for index in range(doubles) for side in ("img", "txt")):
        names += [f"{block}_attn.qkv", f"{block}_attn.proj", f"{block}_mlp.0", f"{block}_mlp.2"]
    names += [f"single_blocks.{index}.{linear}" for index in range(singles) for linear in ("linear1", "linear2")]
    scales = [f"double_blocks.{index}.{side}_attn.norm" for index in range(doubles) for side in ("img", "txt")]
    scales += [f"single_blocks.{index}.norm" for index in range(singles)]
    return {f"{name}.weight" for name in names} | {f"{name}.{part}_norm.scale" for name in scales for part in ("query", "key")}


def tiny_state(guidance):
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}  # norms are ones at first


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "klein"])
def test_tiny_models_round_trip_and_agree_with_diffusers(guidance):
    key_map, state = flux2_key_map(), tiny_state(guidance)
    released = key_map.to_released(state)
    assert released.keys() == expected_names(2, 2, guidance)
    assert_same(key_map.to_diffusers(released), state)
    assert_same(convert_flux2_transformer_checkpoint_to_diffusers(dict(released)), state)
    assert key_map.layout_of(state) == "diffusers"
    assert key_map.layout_of(released) == "released"
    assert key_map.layout_of({f"model.diffusion_model.{name}": None for name in released}) == "released"


@pytest.mark.parametrize("size", REAL_SIZES)
def test_released_sizes_agree_with_diffusers(size):
    sizes, guidance, doubles, singles = REAL_SIZES[size]
    with torch.device("meta"):
        state = Flux2Transformer2DModel(**sizes, guidance_embeds=guidance).state_dict()
    key_map = flux2_key_map()
    released = key_map.to_released(state)
    assert released.keys() == expected_names(doubles, singles, guidance)
    width = sizes["num_attention_heads"] * 128
    assert released["double_blocks.0.img_attn.qkv.weight"].shape == (3 * width, width)
    assert released["single_blocks.0.linear1.weight"].shape == (9 * width, width)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for back in (key_map.to_diffusers(released), convert_flux2_transformer_checkpoint_to_diffusers(dict(released))):
        assert {name: tensor.shape for name, tensor in back.items()} == shapes


def test_the_final_modulation_is_swapped():
    weight = torch.arange(8.0)[:, None]
    released = flux2_key_map().to_released({"norm_out.linear.weight": weight})
    assert released["final_layer.adaLN_modulation.1.weight"].flatten().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_vae_names_agree_with_diffusers_conversion_of_the_same_layout():
    """diffusers cannot convert FLUX.2's VAE file; the names are those of AutoencoderKL but for the quantising convolutions."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=2,
        norm_num_groups=2,
        latent_channels=4,
    )
    key_map, state = vae_key_map(), {name: torch.randn_like(tensor) for name, tensor in vae.state_dict().items()}
    released = key_map.to_released(state)
    assert_same(key_map.to_diffusers(released), state)
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.bias"} <= released.keys()
    assert released["encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert released["decoder.up.3.upsample.conv.weight"].shape == (8, 8, 3, 3)
    elsewhere = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    usual = {}
    for name, tensor in released.items():
        module, _, kind = name.rpartition(".")
        usual[f"{elsewhere.get(module, module)}.{kind}"] = tensor
    assert_same(convert_ldm_vae_checkpoint(usual, vae.config), state)
