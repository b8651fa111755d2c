"""FLUX.1's names against diffusers' own conversion, and for the released sizes by name and shape."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from models.flux.keys import flux_key_map

# Number of tensors in the releases' files.
RELEASED = {"dev": (True, 780), "schnell": (False, 776)}
WIDTH = 3072
"""Diffusers' converter takes every model for one of this width."""


def model_on_meta(**config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return FluxTransformer2DModel(**config).state_dict()


@pytest.mark.parametrize("variant", RELEASED)
def test_released_sizes_agree_with_diffusers(variant):
    guidance, count = RELEASED[variant]
    state, key_map = model_on_meta(guidance_embeds=guidance), flux_key_map()
    released = key_map.to_released(state)
    assert len(released) == count
    assert key_map.layout_of(state) == "diffusers"
    assert key_map.layout_of(released) == "released"
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for back in (key_map.to_diffusers(released), convert_flux_transformer_checkpoint_to_diffusers(dict(released))):
        assert {name: tensor.shape for name, tensor in back.items()} == shapes


def test_shapes_of_the_release():
    """Read in the header of ``flux1-dev.safetensors``."""
    released = flux_key_map().to_released(model_on_meta(guidance_embeds=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    for name, shape in {
        "img_in.weight": (3072, 64),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.out_layer.bias": (3072,),
        "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.18.txt_attn.norm.key_norm.scale": (128,),
        "double_blocks.18.txt_mod.lin.weight": (18432, 3072),
        "single_blocks.37.linear1.weight": (21504, 3072),
        "single_blocks.37.linear2.weight": (3072, 15360),
        "single_blocks.37.modulation.lin.bias": (9216,),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    }.items():
        assert shapes[name] == shape, name


def test_values_agree_with_diffusers():
    """One block of each kind with the real rows, and two columns each: no rule looks at columns."""
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    shapes = {name: tensor.shape for name, tensor in model_on_meta(**config).items()}
    torch.manual_seed(0)
    state = {name: torch.randn(shape[0], *[2] * (len(shape) - 1)) for name, shape in shapes.items()}
    assert shapes["x_embedder.weight"][0] == WIDTH
    key_map = flux_key_map()
    released = key_map.to_released(state)
    for back in (key_map.to_diffusers(released), convert_flux_transformer_checkpoint_to_diffusers(dict(released))):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_modules_of_loras():
    """Where ComfyUI looks a LoRA with released names up; parts of a fused one are rows of it."""
    key_map = flux_key_map()
    assert key_map.module_path("transformer_blocks.3.attn.to_add_out") == "double_blocks.3.txt_attn.proj"
    assert key_map.module_path("single_transformer_blocks.3.proj_out") == "single_blocks.3.linear2"
    source = key_map.sources_of("single_transformer_blocks.3.proj_mlp.weight", "released")
    assert (source.key, source.rows((21504, 3072))) == ("single_blocks.3.linear1.weight", slice(9216, 21504))
