"""Finding the parts of an SD3 model in each layout, and what is said when something is missing or does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.sd3.files import find_files
from models.sd3.options import Sd3Options
from models.sd3.sizes import variant_of
from models.sd3.tiny import VARIANTS, write_tiny
from utils.errors import UserError

LAYOUTS = ("diffusers", "released", "comfy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of each (layout, variant); not to be changed by tests."""
    root = tmp_path_factory.mktemp("sd3")
    for layout in LAYOUTS:
        for variant in VARIANTS:
            write_tiny(variant, root / layout / variant, layout, seed=0)
    return root


@pytest.fixture
def model(models, tmp_path):
    """A copy of an SD3.5 Medium that a test may spoil."""

    def copy(layout, variant="sd35-medium"):
        return Path(shutil.copytree(models / layout / variant, tmp_path / layout))

    return copy


def options(**keys):
    return Sd3Options(type="sd3", **keys)


def error_of(**keys):
    with pytest.raises(UserError) as caught:
        find_files(options(**keys))
    return str(caught.value)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_means_the_same_model(models, layout, variant):
    files = find_files(options(path=models / layout / variant))
    expected = find_files(options(path=models / "diffusers" / variant))
    assert variant_of(files.transformer.config) == variant
    for part in ("transformer", "vae", "clip_l", "clip_g", "t5"):
        ours, theirs = getattr(files, part), getattr(expected, part)
        told = {name: ours.config[name] for name in theirs.config if not name.startswith("_") and name in ours.config}
        assert told == {name: theirs.config[name] for name in told}
        assert all(torch.equal(ours.source.read(name), theirs.source.read(name)) for name in theirs.source.names())


def test_files_have_the_releases_names(models):
    tokenizers = {
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
        *("tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer_config.json"),
    }
    encoders = {f"text_encoders/{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl_fp16")}
    stem = "sd3_medium_incl_clips_t5xxlfp16"
    assert names(models / "released/sd3-medium") == tokenizers | {f"{stem}.safetensors", f"{stem}.json"}
    large = {"sd3.5_large.safetensors", "sd3.5_large.json"}
    assert names(models / "released/sd35-large") == tokenizers | encoders | large
    assert names(models / "comfy/sd35-medium") == encoders | {
        *("diffusion_models/sd3.5_medium.safetensors", "diffusion_models/sd3.5_medium.json", "vae/sd3_vae.safetensors"),
        *(f"text_encoders/clip-vit-large-patch14/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")),
        *(f"text_encoders/t5-v1_1-xxl/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
    }


def test_an_all_in_one_checkpoint_alone_is_enough(models):
    folder = models / "released/sd3-medium"
    files = find_files(options(transformer_path=folder / "sd3_medium_incl_clips_t5xxlfp16.safetensors"))
    assert {part.source.files[0].name for part in (files.vae, files.clip_l, files.clip_g, files.t5)} == {
        "sd3_medium_incl_clips_t5xxlfp16.safetensors"
    }
    assert files.clip_tokenizer.path == folder / "tokenizer/vocab.json"


def test_the_checkpoints_own_vae_goes_before_others(model):
    """FLUX.1's VAE has the same names and shapes: with SD3.5 in one file, the one inside is the right one."""
    root = model("released")
    vae = load_file(root / "sd3.5_medium.safetensors")
    bare = {
        name.removeprefix("first_stage_model."): tensor for name, tensor in vae.items() if name.startswith("first_stage_model.")
    }
    (root / "vae").mkdir()
    save_file(bare, root / "vae/ae.safetensors")
    assert find_files(options(path=root)).vae.source.files == [root / "sd3.5_medium.safetensors"]
    assert find_files(options(path=root, vae_path=root / "vae/ae.safetensors")).vae.source.files == [root / "vae/ae.safetensors"]


def test_comfyuis_checkpoint_folder(model):
    root = model("released")
    (root / "checkpoints").mkdir()
    for ending in ("safetensors", "json"):
        (root / f"sd3.5_medium.{ending}").rename(root / f"checkpoints/sd3.5_medium.{ending}")
    files = find_files(options(path=root))
    assert {part.source.files[0].name for part in (files.transformer, files.vae)} == {"sd3.5_medium.safetensors"}


def test_the_two_clips_are_told_apart_by_their_width(model):
    """A CLIP-L that brings OpenAI's projection along has the names of a CLIP-G; ComfyUI does not use that projection."""
    root = model("comfy")
    path = root / "text_encoders/clip_l.safetensors"
    save_file({**load_file(path), "text_projection.weight": torch.randn(192, 192)}, path)
    path.rename(path.with_name("ViT-L-14.safetensors"))
    files = find_files(options(path=root))
    assert files.clip_l.source.files[0].name == "ViT-L-14.safetensors"
    assert files.clip_g.source.files[0].name == "clip_g.safetensors"
    message = error_of(path=root, text_encoder_path=root / "text_encoders/clip_g.safetensors")
    assert "has the width 320, the transformer wants 192" in message


def test_the_same_weights_twice_in_a_diffusers_folder(model):
    root = model("diffusers")
    for name in ("text_encoder", "text_encoder_2"):
        half = {key: tensor.half() for key, tensor in load_file(root / name / "model.safetensors").items()}
        save_file(half, root / name / "model.fp16.safetensors")
    assert find_files(options(path=root)).clip_g.source.files == [root / "text_encoder_2/model.safetensors"]


def test_all_missing_parts_are_reported_together(model):
    root = model("comfy")
    shutil.rmtree(root / "text_encoders")
    (root / "vae/sd3_vae.safetensors").unlink()
    message = error_of(path=root)
    for key in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_3"):
        assert f"model.{key}_path" in message
    assert "model.transformer_path" not in message
    assert "openai/clip-vit-large-patch14" in message
    assert "google/t5-v1_1-xxl" in message


def test_without_t5_it_says_how_to_train_without_it(model):
    root = model("comfy")
    (root / "text_encoders/t5xxl_fp16.safetensors").unlink()
    shutil.rmtree(root / "text_encoders/t5-v1_1-xxl")
    assert "set model.t5 = false" in error_of(path=root)
    files = find_files(options(path=root, t5=False))
    assert files.t5 is None
    assert files.t5_tokenizer is None


def test_a_wrong_path_is_the_only_problem(tmp_path):
    message = error_of(path=tmp_path / "gone")
    assert "does not exist" in message
    assert "t5" not in message


def test_a_vae_of_another_scale_is_refused(model):
    root = model("diffusers")
    config = root / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.3611, "shift_factor": 0.1159}))
    message = error_of(path=root)
    assert "'scaling_factor': 0.3611" in message
    assert "it belongs to another model" in message


def test_a_vae_of_another_width_is_refused(model):
    root = model("comfy")
    vae = load_file(root / "vae/sd3_vae.safetensors")
    vae["decoder.conv_in.weight"] = vae["decoder.conv_in.weight"][:, :4].clone()
    vae["encoder.conv_out.weight"] = vae["encoder.conv_out.weight"][:8].clone()
    vae["encoder.conv_out.bias"] = vae["encoder.conv_out.bias"][:8].clone()
    save_file(vae, root / "vae/sd3_vae.safetensors")
    assert "has the width 4, the transformer wants 16" in error_of(path=root)


def test_weights_of_another_family(models, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4)}, file)
    message = error_of(path=models / "comfy/sd35-large", transformer_path=file)
    assert f"model.transformer_path: {file} holds FLUX or HunyuanVideo, which type = 'sd3' does not train" in message


def test_config_of_another_model(model):
    root = model("comfy")
    path = root / "diffusion_models/sd3.5_medium.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 38}))
    message = error_of(path=root)
    assert "num_layers: 38 in config.json, 4 by the weights" in message


def test_unknown_width_of_the_heads(model):
    """SD3 Medium has no norms of queries and keys, so nothing in the weights tells it; SD3.5's weights do."""
    medium = model("comfy", "sd3-medium")
    (medium / "diffusion_models/sd3_medium.json").unlink()
    assert "its width 32 is not a multiple of 64" in error_of(path=medium)


def test_sd35_tells_the_width_of_its_heads(model):
    root = model("comfy")
    (root / "diffusion_models/sd3.5_medium.json").unlink()
    assert find_files(options(path=root)).transformer.config["num_attention_heads"] == 2


def test_truncated_checkpoint(model):
    file = model("released", "sd3-medium") / "sd3_medium_incl_clips_t5xxlfp16.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    message = error_of(path=file.parent, transformer_path=file)
    assert f"{file} has {len(content) // 2} bytes; by its header it should have {len(content)}" in message
