"""Names of Wan's frozen networks at their real sizes, against the release's modules and against diffusers' conversion."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.common.tiny import write_t5_tokenizer
from models.wan.encoder_keys import clip_key_map, t5_key_map, vae_key_map
from models.wan.tiny import tiny_model


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(build) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: tensor for name, tensor in build().state_dict().items() if "embed_tokens" not in name}


def test_t5_has_the_releases_names():
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    expected = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for index in range(24):
        expected |= {f"blocks.{index}.attn.{part}.weight": (4096, 4096) for part in "qkvo"}
        expected |= {f"blocks.{index}.norm{number}.weight": (4096,) for number in (1, 2)}
        expected |= {f"blocks.{index}.ffn.{part}.weight": (10240, 4096) for part in ("gate.0", "fc1")}
        expected |= {f"blocks.{index}.ffn.fc2.weight": (4096, 10240)}
        expected |= {f"blocks.{index}.pos_embedding.embedding.weight": (32, 64)}
    assert shapes(t5_key_map().to_released(on_meta(lambda: UMT5EncoderModel(config)))) == expected


def test_clip_has_the_releases_names():
    config = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)
    expected = {
        "cls_embedding": (1, 1, 1280),
        "pos_embedding": (1, 257, 1280),
        "patch_embedding.weight": (1280, 3, 14, 14),
    }
    norms = ["pre_norm", "post_norm", *(f"transformer.{index}.norm{number}" for index in range(32) for number in (1, 2))]
    linears = {"attn.to_qkv": (3840, 1280), "attn.proj": (1280, 1280), "mlp.0": (5120, 1280), "mlp.2": (1280, 5120)}
    expected |= {f"{norm}.{kind}": (1280,) for norm in norms for kind in ("weight", "bias")}
    for index in range(32):
        expected |= {f"transformer.{index}.{name}.weight": shape for name, shape in linears.items()}
        expected |= {f"transformer.{index}.{name}.bias": shape[:1] for name, shape in linears.items()}
    assert shapes(clip_key_map().to_released(on_meta(lambda: CLIPVisionModel(config)))) == expected


@pytest.mark.parametrize("base", [4, 96])
def test_vae_names_agree_with_diffusers(base):
    state = on_meta(lambda: AutoencoderKLWan(base_dim=base))
    released = vae_key_map().to_released(state)
    assert {"encoder.downsamples.10.residual.6.weight", "decoder.upsamples.14.residual.0.gamma", "conv2.bias"} <= released.keys()
    converted = convert_wan_vae_to_diffusers(dict(released))
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)


def test_key_maps_round_trip(tmp_path):
    write_t5_tokenizer(tmp_path)
    model = tiny_model("wan-i2v", tmp_path, seed=5, scale=1)
    for key_map, part in (
        (t5_key_map(), model.text_encoder),
        (clip_key_map(), model.image_encoder),
        (vae_key_map(), model.vae),
    ):
        back = key_map.to_diffusers(key_map.to_released(part.state))
        assert back.keys() == part.state.keys()
        assert all(torch.equal(back[name], part.state[name]) for name in back)
