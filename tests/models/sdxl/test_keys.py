"""SDXL's names against diffusers' own conversion, for tiny models by value and for the released sizes by name and shape."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.sdxl.keys import UNET_PREFIX, open_clip_key_map, unet_key_map
from models.sdxl.networks import NETWORKS, PREFIXES
from models.sdxl.sizes import pooled_width, unet_config, vae_config
from models.sdxl.tiny import tiny_model
from utils.weights.tensor_files import TensorInfo

REAL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
ENDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407, "vocab_size": 49408}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, **ENDS}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, **ENDS}


def real_parts() -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        return {
            "transformer": UNet2DConditionModel(**REAL_UNET),
            "vae": AutoencoderKL(**REAL_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, projection_dim=768)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280, hidden_act="gelu")),
        }


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(vocabulary=300, seed=1, scale=1)


@pytest.fixture(scope="module")
def real():
    return real_parts()


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def names_of(module: torch.nn.Module) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("part", PREFIXES)
def test_every_part_round_trips(tiny, part):
    key_map, state = NETWORKS[part].key_map(), tiny.parts()[part].state
    assert_same(key_map.to_diffusers(key_map.to_released(state)), state)


@pytest.mark.parametrize(("part", "count"), {"transformer": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389}.items())
def test_released_sizes_round_trip(real, part, count):
    """The numbers of tensors in the release's checkpoint, without buffers and what is not used."""
    state = real[part].state_dict()
    released = NETWORKS[part].key_map().to_released(state)
    assert len(released) == count
    assert shapes(NETWORKS[part].key_map().to_diffusers(released)) == shapes(state)


@pytest.mark.parametrize("size", ["tiny", "real"])
def test_unet_agrees_with_diffusers(tiny, real, size):
    state = tiny.transformer.state if size == "tiny" else real["transformer"].state_dict()
    released = {UNET_PREFIX + name: tensor for name, tensor in unet_key_map().to_released(state).items()}
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    converted = convert_ldm_unet_checkpoint(released, config)
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)


def test_vae_agrees_with_diffusers(tiny):
    released = {f"first_stage_model.{name}": tensor for name, tensor in tiny.released("vae").items()}
    assert released["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert_same(convert_ldm_vae_checkpoint(released, tiny.vae.module.config), tiny.vae.state)


def test_text_encoder_2_agrees_with_diffusers(tiny):
    prefix = PREFIXES["text_encoder_2"]
    released = {prefix + name: tensor for name, tensor in tiny.released("text_encoder_2").items()}
    assert {f"{prefix}text_projection", f"{prefix}positional_embedding"} <= released.keys()
    converted = convert_open_clip_checkpoint(tiny.text_encoder_2.module, released, prefix=prefix)
    assert_same(converted, tiny.text_encoder_2.state)


def test_names_of_the_release():
    key_map = unet_key_map()
    for ours, theirs in {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj": "output_blocks.2.1.transformer_blocks.9.ff.net.0.proj",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        assert key_map.module_path(ours) == theirs
    key_map = open_clip_key_map("")
    assert (
        key_map.released_name("text_model.encoder.layers.31.self_attn.k_proj.bias") == "transformer.resblocks.31.attn.in_proj_bias"
    )


def test_released_sizes_are_read_from_the_tensors_alone(real):
    config = unet_config(names_of(real["transformer"]), None)
    assert {name: config[name] for name in REAL_UNET} == REAL_UNET
    assert pooled_width(config) == 1280
    config = vae_config(names_of(real["vae"]), None)
    assert {name: config[name] for name in REAL_VAE} == REAL_VAE
    for part, sizes in {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}.items():
        config = NETWORKS[part].config(names_of(real[part]), None)
        assert {name: config[name] for name in sizes} == sizes
        assert config["hidden_act"] == {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}[part]
