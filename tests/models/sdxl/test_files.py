"""Where the parts of an SDXL model are found, and what is said of those that are not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.sdxl.files import find_files
from models.sdxl.options import SdxlOptions
from models.sdxl.tiny import CHECKPOINT, write_tiny
from utils.errors import UserError

LAYOUTS = ("diffusers", "released", "comfy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    for layout in LAYOUTS:
        write_tiny("sdxl", root / layout, layout, seed=0)
    return root


@pytest.fixture
def model(models, tmp_path):
    """A copy to spoil."""
    return lambda layout: Path(shutil.copytree(models / layout, tmp_path / layout))


def options(**keys) -> SdxlOptions:
    return SdxlOptions(type="sdxl", **keys)


def error_of(**keys) -> str:
    with pytest.raises(UserError) as raised:
        find_files(options(**keys))
    return str(raised.value)


def places(files) -> list[str]:
    found = (files.transformer, files.vae, files.text_encoder, files.text_encoder_2)
    return [str(part.source.files[0].relative_to(part.source.files[0].parents[1])) for part in found]


def test_the_layouts(models):
    assert places(find_files(options(path=models / "diffusers"))) == [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    ]
    assert places(find_files(options(path=models / "comfy"))) == [
        f"diffusion_models/{CHECKPOINT}.safetensors",
        "vae/sdxl_vae.safetensors",
        "text_encoders/clip_l.safetensors",
        "text_encoders/clip_g.safetensors",
    ]
    assert set(places(find_files(options(path=models / "released")))) == {f"released/{CHECKPOINT}.safetensors"}


@pytest.mark.parametrize("key", ["path", "transformer_path"])
def test_one_file_is_enough(models, key):
    """With the tokenizer beside it."""
    file = models / "released" / f"{CHECKPOINT}.safetensors"
    assert set(places(find_files(options(**{key: file})))) == {f"released/{CHECKPOINT}.safetensors"}


def test_comfys_checkpoints_with_a_vae_of_its_own(model):
    """The checkpoint's own parts go before others in the folder, named parts before both."""
    comfy, released = model("comfy"), model("released")
    (comfy / "checkpoints").mkdir()
    for ending in ("safetensors", "json"):
        shutil.copy(released / f"{CHECKPOINT}.{ending}", comfy / f"checkpoints/{CHECKPOINT}.{ending}")
    checkpoint = f"checkpoints/{CHECKPOINT}.safetensors"
    assert places(find_files(options(path=comfy))) == [checkpoint] * 4
    named = find_files(options(path=comfy, vae_path=comfy / "vae/sdxl_vae.safetensors"))
    assert places(named) == [checkpoint, "vae/sdxl_vae.safetensors", checkpoint, checkpoint]


def test_comfy_folder_with_files_of_other_models(model):
    comfy = model("comfy")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, comfy / "diffusion_models/flux1-dev.safetensors")
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4)}, comfy / "text_encoders/t5xxl.safetensors")
    files = find_files(options(path=comfy))
    assert places(files)[2:] == ["text_encoders/clip_l.safetensors", "text_encoders/clip_g.safetensors"]


def test_halved_copies_beside_the_weights(model):
    """Releases hold every part a second time as fp16."""
    folder = model("diffusers")
    for name in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        shutil.copy(folder / f"{name}.safetensors", folder / f"{name}.fp16.safetensors")
    assert places(find_files(options(path=folder)))[2] == "text_encoder/model.safetensors"


def test_all_missing_parts_are_reported_together(model):
    folder = model("comfy")
    for name in ("vae/sdxl_vae.safetensors", "text_encoders/clip_g.safetensors", "text_encoders/clip_l.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "text_encoders/clip-vit-large-patch14")
    message = error_of(path=folder)
    for key in ("vae_path", "text_encoder_path", "text_encoder_2_path", "tokenizer_path"):
        assert f"model.{key}" in message
    assert "model.transformer_path" not in message
    assert "https://huggingface.co/openai/clip-vit-large-patch14" in message


def test_a_checkpoint_without_text_encoders(model):
    folder = model("released")
    file = folder / f"{CHECKPOINT}.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "embedders" not in name}, file)
    message = error_of(path=file)
    assert "no CLIP-G text encoder: set model.path (a folder) or model.text_encoder_2_path" in message
    assert "VAE" not in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, "FLUX"),
        (lambda state: state | {"input_blocks.9.0.op.weight": torch.zeros(1)}, "Stable Diffusion 1 or 2, or SDXL's refiner"),
        (lambda state: state | {"input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}, "9 channels in (for inpainting)"),
        (lambda state: state | {"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "EDM's schedule"),
        (lambda state: {name: t for name, t in state.items() if "label_emb" not in name}, "is missing"),
    ],
)
def test_models_that_are_not_supported(model, change, what):
    folder = model("comfy")
    file = folder / f"diffusion_models/{CHECKPOINT}.safetensors"
    save_file(change(load_file(file)), file)
    message = error_of(path=folder, transformer_path=file)
    assert what in message
    assert str(file) in message


def test_a_vae_of_other_latents(model):
    folder = model("diffusers")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    assert "Playground" in error_of(path=folder)


def test_a_config_of_another_model(model):
    folder = model("diffusers")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [320, 640, 1280]}))
    message = error_of(path=folder)
    assert "block_out_channels: [320, 640, 1280] in config.json, [8, 16, 32] by the weights" in message


def test_unknown_number_of_heads(model):
    folder = model("released")
    (folder / f"{CHECKPOINT}.json").unlink()
    assert "its width 32 is not a multiple of 64" in error_of(path=folder)
