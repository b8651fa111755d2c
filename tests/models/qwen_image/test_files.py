"""Finding the parts of a Qwen-Image model in each layout, which model it is, and what is said when something does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from models import load_family
from models.common.wan_vae import vae_key_map
from models.qwen_image import sizes
from models.qwen_image.files import VARIANTS, find_files
from models.qwen_image.keys import LAYERED, qwen_key_map
from models.qwen_image.networks import build_text_encoder
from tests.models.qwen_image.test_keys import QWEN_2_5_VL_7B
from utils.errors import UserError
from utils.weights.named import WeightSource
from utils.weights.tensor_files import TensorInfo

LAYOUTS = ("diffusers", "released", "comfy")
COMFY = {
    "transformer": "diffusion_models/qwen_image_bf16.safetensors",
    "vae": "vae/qwen_image_vae.safetensors",
    "text_encoder": "text_encoders/qwen_2.5_vl_7b.safetensors",
}
Options = load_family("qwen_image").Options


def options(**keys):
    return Options(type="qwen_image", **keys)


def found(**keys):
    chosen = options(**keys)
    return find_files(chosen, chosen.variant)


def error_of(**keys):
    with pytest.raises(UserError) as caught:
        found(**keys)
    return str(caught.value)


def names_of(state):
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def on_meta(build):
    with torch.device("meta"):
        return names_of(build().state_dict())


@pytest.fixture
def model(tiny_qwen, tmp_path):
    """A copy of a model that a test may spoil."""
    return lambda variant, layout: Path(shutil.copytree(tiny_qwen(variant, layout), tmp_path / layout))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_means_the_same_transformer(tiny_qwen, layout, variant):
    files = found(path=tiny_qwen(variant, layout))
    assert files.variant == variant
    assert (files.image_processor is not None) == (variant != "qwen-image" and layout != "comfy")
    saved = QwenImageTransformer2DModel.load_config(tiny_qwen(variant) / "transformer")
    assert {name: saved[name] for name in files.config} == json.loads(json.dumps(files.config))

    source = WeightSource(files.transformer, qwen_key_map())
    expected = load_file(tiny_qwen(variant) / "transformer/diffusion_pytorch_model.safetensors")
    assert source.names().keys() == expected.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_single_files_need_no_folder(tiny_qwen):
    root = tiny_qwen("qwen-image", "comfy")
    parts = {f"{part}_path": root / name for part, name in COMFY.items()}
    files = found(**parts, tokenizer_path=root / "text_encoders/qwen2.5-vl")
    assert (files.transformer, files.vae) == (parts["transformer_path"], parts["vae_path"])
    assert found(**parts).tokenizer == files.tokenizer  # beside the text encoder


@pytest.mark.parametrize("place", ["checkpoints/all.safetensors", "all.safetensors"])
def test_an_all_in_one_checkpoint_holds_every_part(model, tmp_path, place):
    comfy = model("qwen-image-edit-2511", "comfy")
    prefixes = {
        "model.diffusion_model.": "diffusion_models/qwen_image_edit_2511_bf16.safetensors",
        "vae.": COMFY["vae"],
        "text_encoders.qwen25_7b.transformer.": COMFY["text_encoder"],
    }
    whole = {prefix + name: t for prefix, file in prefixes.items() for name, t in load_file(comfy / file).items()}
    target = tmp_path / "one" / place
    target.parent.mkdir(parents=True)
    save_file(whole, target)
    configs = [json.loads((comfy / file).with_suffix(".json").read_text()) for file in list(prefixes.values())[::2]]
    target.with_suffix(".json").write_text(json.dumps(configs[0]))
    (target.parent / "config.json").write_text(json.dumps(configs[1]))
    tokenizer = comfy / "text_encoders/qwen2.5-vl"
    for files in (found(path=tmp_path / "one", tokenizer_path=tokenizer), found(transformer_path=target, tokenizer_path=tokenizer)):
        assert {files.transformer, files.vae, files.text_encoder} == {target}
        assert files.variant == "qwen-image-edit-2511"


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("qwen_image_fp8_e4m3fn", "qwen-image"),
        ("Qwen-Image-Edit_bf16", "qwen-image-edit"),
        ("qwen_image_edit_2509_bf16", "qwen-image-edit-plus"),
        ("my_style", "qwen-image"),
    ],
)
def test_a_file_says_by_its_name_what_it_is(model, caplog, file, variant):
    caplog.set_level("INFO")
    root = model("qwen-image", "comfy")
    for suffix in (".safetensors", ".json"):
        (root / COMFY["transformer"]).with_suffix(suffix).rename(root / "diffusion_models" / f"{file}{suffix}")
    assert found(path=root).variant == variant
    assert f"is taken for {variant} by its name; model.variant says otherwise" in caplog.text
    assert found(path=root, variant="qwen-image-edit-plus").variant == "qwen-image-edit-plus"


def test_the_users_word_counts_unless_the_weights_say_otherwise(tiny_qwen, caplog):
    files = found(path=tiny_qwen("qwen-image-edit"), variant="qwen-image-edit-2511")
    assert files.config["zero_cond_t"]
    assert "does not say that it is qwen-image-edit-2511" in caplog.text
    assert not found(path=tiny_qwen("qwen-image-edit"), variant="qwen-image").config["zero_cond_t"]
    for layout in LAYOUTS:
        message = error_of(path=tiny_qwen("qwen-image-edit-2511", layout), variant="qwen-image-edit-plus")
        assert "says that it is qwen-image-edit-2511 (zero_cond_t): set model.variant to that" in message


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    message = error_of(path=tmp_path)
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert f"model.{part}_path" in message
    assert "https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct" in message
    assert "no Qwen-Image transformer: set model.path (a folder) or model.transformer_path" in error_of()


def test_parts_of_another_model(model, tmp_path):
    root = model("qwen-image", "comfy")
    load_family("wan").write_tiny("wan-t2v", tmp_path / "wan", "comfy", seed=0)
    wan = tmp_path / "wan/diffusion_models/wan2.1_t2v_tiny.safetensors"
    message = error_of(path=root, transformer_path=wan, variant="qwen-image")
    assert "holds Wan, which type = 'qwen_image' does not train" in message
    with torch.device("meta"):
        state = AutoencoderKLQwenImage(base_dim=4, z_dim=8).state_dict()
    small = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    save_file(vae_key_map().to_released(small), tmp_path / "small.safetensors")
    message = error_of(path=root, vae_path=tmp_path / "small.safetensors")
    assert "has the width 8, the transformer wants 16; it belongs to another model" in message


def test_layered_is_refused_by_name(model):
    root = model("qwen-image", "comfy")
    file = root / COMFY["transformer"]
    save_file({**load_file(file), LAYERED: torch.zeros(2, 32)}, file)
    assert "this is Qwen-Image-Layered, which is not supported" in error_of(path=root)


def test_config_of_another_model(model):
    root = model("qwen-image", "diffusers")
    file = root / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 60}))
    assert "config.json is of another model" in error_of(path=root)
    assert "num_layers: 60 in config.json, 4 by the weights" in error_of(path=root)


def test_heads_of_another_width_want_a_config(model):
    root = model("qwen-image", "comfy")
    (root / COMFY["transformer"]).with_suffix(".json").unlink()
    assert "its heads are 16 wide" in error_of(path=root)
    assert "put the model's config.json beside the file" in error_of(path=root)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_real_sizes_need_no_config(zero_cond_t):
    """ComfyUI's files have none: what the tensors do not tell is the same in every release."""
    released = {"zero_cond_t": True} if zero_cond_t else None
    config = sizes.transformer_config(on_meta(QwenImageTransformer2DModel), released)
    with torch.device("meta"):
        usual = dict(QwenImageTransformer2DModel(zero_cond_t=zero_cond_t).config)
    assert config == {name: usual[name] for name in config}
    config = sizes.vae_config(on_meta(AutoencoderKLQwenImage), None)
    with torch.device("meta"):
        usual = dict(AutoencoderKLQwenImage().config)
    assert config == {name: usual[name] for name in config}


# The settings of Qwen/Qwen2.5-VL-7B-Instruct's config.json that decide what it computes, in the form of that file.
RELEASED_CONFIG = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 128000,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}


def test_the_text_encoders_config():
    """The same from the release's file, from today's form of it, and from the tensors alone."""
    names = on_meta(lambda: build_text_encoder(QWEN_2_5_VL_7B))
    config = sizes.text_encoder_config(names, None)
    assert sizes.text_encoder_config(names, RELEASED_CONFIG) == config
    assert sizes.text_encoder_config(names, json.loads(json.dumps(config))) == config
    for key, value in RELEASED_CONFIG.items():
        if key not in ("model_type", "vision_config", "rope_scaling", "rope_theta"):
            assert {**config, **config["text_config"]}[key] == value, key
    assert config["text_config"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    assert RELEASED_CONFIG["vision_config"].items() <= config["vision_config"].items()
    assert on_meta(lambda: build_text_encoder(config)) == names
