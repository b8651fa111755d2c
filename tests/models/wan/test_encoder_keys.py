"""Names of Wan's frozen networks at their real sizes, against the release's modules and against diffusers' conversion."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.common.tiny import write_t5_tokenizer
from models.wan.encoder_keys import clip_key_map, t5_key_map, vae_22_key_map, vae_key_map
from models.wan.sizes import vae_config
from models.wan.tiny import tiny_model
from utils.weights.tensor_files import TensorInfo


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


def released_22_vae() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of ``Wan2.2_VAE.pth``, by the modules of the release's ``wan/modules/vae2_2.py``."""

    def conv(name, out, channels, *kernel):
        yield f"{name}.weight", (out, channels, *kernel)
        yield f"{name}.bias", (out,)

    def block(name, channels, out):
        yield f"{name}.residual.0.gamma", (channels, 1, 1, 1)
        yield from conv(f"{name}.residual.2", out, channels, 3, 3, 3)
        yield f"{name}.residual.3.gamma", (out, 1, 1, 1)
        yield from conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if channels != out:
            yield from conv(f"{name}.shortcut", out, channels, 1, 1, 1)

    def coder(name, widths, inside, blocks, time, frames_out, channels, out):
        yield from conv(f"{name}.conv1", widths[0], channels, 3, 3, 3)
        for level, wide in enumerate(widths[1:]):
            part = f"{name}.{inside}.{level}.{inside}"
            for index in range(blocks):
                yield from block(f"{part}.{index}", widths[level] if index == 0 else wide, wide)
            if level < 3:
                yield from conv(f"{part}.{blocks}.resample.1", wide, wide, 3, 3)
            if time[level]:
                yield from conv(f"{part}.{blocks}.time_conv", frames_out * wide, wide, 3, 1, 1)
        middle = widths[0] if name == "decoder" else widths[-1]
        for index in (0, 2):
            yield from block(f"{name}.middle.{index}", middle, middle)
        yield f"{name}.middle.1.norm.gamma", (middle, 1, 1)
        yield from conv(f"{name}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
        yield from conv(f"{name}.middle.1.proj", middle, middle, 1, 1)
        yield f"{name}.head.0.gamma", (widths[-1], 1, 1, 1)
        yield from conv(f"{name}.head.2", out, widths[-1], 3, 3, 3)

    yield from coder("encoder", (160, 160, 320, 640, 640), "downsamples", 2, (False, True, True, False), 1, 12, 96)
    yield from coder("decoder", (1024, 1024, 1024, 512, 256), "upsamples", 3, (True, True, False, False), 2, 48, 12)
    yield from conv("conv1", 96, 96, 1, 1, 1)
    yield from conv("conv2", 48, 48, 1, 1, 1)


def test_22_vae_has_the_releases_names():
    """And its config is read from them alone; diffusers' own conversion knows the 2.1 VAE only."""
    expected = dict(released_22_vae())
    key_map = vae_22_key_map()
    found = key_map.to_diffusers({name: torch.empty(shape, device="meta") for name, shape in expected.items()})
    config = vae_config({name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}, None)
    sizes = ("base_dim", "decoder_base_dim", "z_dim", "patch_size", "in_channels", "scale_factor_spatial")
    assert [config[name] for name in sizes] == [160, 256, 48, 2, 12, 16]
    state = on_meta(lambda: AutoencoderKLWan(**config))
    assert shapes(found) == shapes(state)
    assert shapes(key_map.to_released(state)) == expected


def test_key_maps_round_trip(tmp_path):
    write_t5_tokenizer(tmp_path)
    model = tiny_model("wan-i2v", tmp_path, seed=5, scale=1)
    for key_map, part in (
        (t5_key_map(), model.text_encoder),
        (clip_key_map(), model.image_encoder),
        (vae_key_map(), model.vae),
        (vae_22_key_map(), tiny_model("wan-ti2v", tmp_path, seed=5, scale=1).vae),
    ):
        back = key_map.to_diffusers(key_map.to_released(part.state))
        assert back.keys() == part.state.keys()
        assert all(torch.equal(back[name], part.state[name]) for name in back)
