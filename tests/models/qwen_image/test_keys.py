"""Qwen-Image's names: at the released sizes, in every file that people have, and against diffusers' and transformers' own."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, QwenImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.common.wan_vae import vae_key_map
from models.qwen_image.keys import EDIT_2511_MARK, qwen_key_map, text_key_map
from models.qwen_image.networks import build_text_encoder
from models.qwen_image.sizes import TEXT_CONSTANTS, VISION_CONSTANTS
from utils.weights.named import WeightSource

QWEN_2_5_VL_7B = {
    "text_config": {
        **TEXT_CONSTANTS,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {**VISION_CONSTANTS, "hidden_size": 1280, "out_hidden_size": 3584},
}


def on_meta(build):
    with torch.device("meta"):
        return build().state_dict()


def test_the_released_transformer():
    """Every key and shape of Qwen/Qwen-Image: 60 blocks of 24 heads of 128.  ComfyUI looks for ``txt_norm.weight``."""
    state = on_meta(QwenImageTransformer2DModel)
    width, text = 3072, 3584
    linears = {
        "img_in": (width, 64),
        "txt_in": (width, text),
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (64, width),
    }
    expected = {"txt_norm.weight": (text,)}
    for index in range(60):
        block = f"transformer_blocks.{index}."
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            linears[f"{block}attn.{name}"] = (width, width)
        for stream in ("img", "txt"):
            linears[f"{block}{stream}_mod.1"] = (6 * width, width)
            linears[f"{block}{stream}_mlp.net.0.proj"] = (4 * width, width)
            linears[f"{block}{stream}_mlp.net.2"] = (width, 4 * width)
        expected |= {f"{block}attn.norm_{name}.weight": (128,) for name in ("q", "k", "added_q", "added_k")}
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    released = qwen_key_map().to_released(state)
    assert {name: tuple(tensor.shape) for name, tensor in released.items()} == expected
    assert released.keys() == state.keys()
    assert qwen_key_map().to_diffusers(released).keys() == state.keys()


def test_the_released_text_encoder():
    """Names of transformers before 4.52, which the release's and ComfyUI's files have, without the head."""
    state = on_meta(lambda: build_text_encoder(QWEN_2_5_VL_7B))
    theirs = on_meta(lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN_2_5_VL_7B)))
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in theirs.items() if name != "lm_head.weight"
    }
    released = text_key_map().to_released(state)
    assert len(released) == len(state) == 728
    assert released["model.layers.27.self_attn.k_proj.bias"].shape == (512,)
    assert released["model.embed_tokens.weight"].shape == (152064, 3584)
    assert released["visual.blocks.31.attn.qkv.weight"].shape == (3840, 1280)
    assert released["visual.patch_embed.proj.weight"].shape == (1280, 3, 2, 14, 14)
    assert released["visual.merger.mlp.2.weight"].shape == (3584, 5120)
    assert {name.split(".")[0] for name in released} == {"model", "visual"}


def test_names_that_transformers_saves(tiny_qwen, tmp_path):
    folder = tiny_qwen("qwen-image") / "text_encoder"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    saved, ours = (WeightSource(path, text_key_map()) for path in (tmp_path, folder))
    assert saved.names() == ours.names()
    assert {name.removesuffix("_") for name in saved.names()} | {"lm_head.weight"} == model.state_dict().keys()
    assert all(torch.equal(saved.read(name), ours.read(name)) for name in ours.names())
    # Today's names of the modules are read too.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "today.safetensors")
    today = WeightSource(tmp_path / "today.safetensors", text_key_map())
    assert today.layout == "diffusers"
    assert all(torch.equal(today.read(name), ours.read(name)) for name in ours.names())


@pytest.mark.parametrize("base", [4, 96])
def test_the_vae_is_wans(base):
    state, wan = (on_meta(lambda kind=kind: kind(base_dim=base)) for kind in (AutoencoderKLQwenImage, AutoencoderKLWan))
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert shapes == {name: tensor.shape for name, tensor in wan.items()}
    converted = convert_wan_vae_to_diffusers(vae_key_map().to_released(state))
    assert {name: tensor.shape for name, tensor in converted.items()} == shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_files(tiny_qwen, tmp_path, prefix):
    """With a prefix or not, with the mark of Edit-2511, and beside the other parts of an all-in-one checkpoint."""
    state = load_file(tiny_qwen("qwen-image-edit-2511") / "transformer/diffusion_pytorch_model.safetensors")
    others = {"vae.conv1.weight": torch.zeros(2), "text_encoders.qwen25_7b.transformer.model.norm.weight": torch.zeros(2)}
    file = tmp_path / "qwen.safetensors"
    save_file(
        {prefix + name: t for name, t in {**state, EDIT_2511_MARK: torch.zeros(0)}.items()} | (others if prefix else {}), file
    )
    source = WeightSource(file, qwen_key_map())
    assert source.names().keys() == state.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())


def test_diffusers_reads_the_released_layout(tiny_qwen, tmp_path):
    folder = tiny_qwen("qwen-image") / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(qwen_key_map().to_released(state), tmp_path / "full.safetensors")
    model = QwenImageTransformer2DModel.from_single_file(tmp_path / "full.safetensors", config=str(folder))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
