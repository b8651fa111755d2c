"""Tiny models: the command, and what it writes against the layouts of the real releases."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from transformers import AutoTokenizer

from models import family_names, load_family, tiny
from models.common.text_encoders import find_tokenizer
from models.common.tiny import write_t5_tokenizer
from models.wan.tiny import VARIANTS, tiny_model, write_tiny
from tests.models.wan.reference import PIPELINES
from utils.errors import UserError

LAYOUTS = ("diffusers", "released", "comfy")
FILES = {
    ("diffusers", "wan-t2v"): """
        model_index.json scheduler/scheduler_config.json
        transformer/config.json transformer/diffusion_pytorch_model.safetensors
        vae/config.json vae/diffusion_pytorch_model.safetensors
        text_encoder/config.json text_encoder/model.safetensors
        tokenizer/tokenizer.json tokenizer/tokenizer_config.json""",
    ("released", "wan-t2v"): """
        config.json diffusion_pytorch_model.safetensors Wan2.1_VAE.pth models_t5_umt5-xxl-enc-bf16.pth
        google/umt5-xxl/tokenizer.json google/umt5-xxl/tokenizer_config.json""",
    ("released", "wan-i2v"): """
        config.json diffusion_pytorch_model.safetensors.index.json
        diffusion_pytorch_model-00001-of-00002.safetensors diffusion_pytorch_model-00002-of-00002.safetensors
        Wan2.1_VAE.pth models_t5_umt5-xxl-enc-bf16.pth models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
        google/umt5-xxl/tokenizer.json google/umt5-xxl/tokenizer_config.json""",
    ("comfy", "wan-i2v"): """
        diffusion_models/wan2.1_i2v_tiny.safetensors diffusion_models/wan2.1_i2v_tiny.json
        vae/wan_2.1_vae.safetensors clip_vision/clip_vision_h.safetensors text_encoders/umt5_xxl_fp16.safetensors
        text_encoders/umt5-xxl/tokenizer.json text_encoders/umt5-xxl/tokenizer_config.json""",
}


def contents(folder):
    """Hash of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_variants_of_all_families():
    expected = sorted(variant for name in family_names() for variant in load_family(name).variants)
    assert {"wan-t2v", "wan-i2v"} <= set(expected)
    assert sorted(tiny.variants()) == expected


@pytest.mark.parametrize(("layout", "variant"), FILES)
def test_files_have_the_releases_names(tmp_path, layout, variant):
    write_tiny(variant, tmp_path, layout, seed=0)
    assert contents(tmp_path).keys() == set(FILES[layout, variant].split())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bytes_for_the_same_seed(tmp_path, layout):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        tiny.write("wan-i2v", tmp_path / name, layout, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    weights = [name for name in one if name.endswith((".safetensors", ".pth"))]
    assert weights
    assert all(one[name] != other[name] for name in weights)


def test_every_parameter_is_random(tmp_path):
    write_t5_tokenizer(tmp_path)
    model = tiny_model("wan-i2v", tmp_path, seed=0, scale=1)
    for part in (model.transformer, model.vae, model.text_encoder, model.image_encoder):
        for name, tensor in part.state.items():
            assert tensor.unique().numel() > 0.99 * tensor.numel(), name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_it_whole_and_every_weight_matters(tmp_path, variant):
    write_tiny(variant, tmp_path, "diffusers", seed=0)
    pipeline = PIPELINES[variant].from_pretrained(tmp_path)
    loaded = [name for name in ("transformer", "transformer_2") if getattr(pipeline, name) is not None]
    assert len(loaded) == 2 if variant.startswith("wan22") else loaded == ["transformer"]
    for name in loaded:
        _, report = WanTransformer3DModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    transformer = getattr(pipeline, loaded[-1])
    config = transformer.config
    assert config.num_layers == 4
    inputs = torch.randn(1, config.in_channels, 2, 4, 6)
    images = 2 if config.pos_embed_seq_len else 1
    image = torch.randn(images, 257, config.image_dim) if config.image_dim else None
    text = torch.randn(1, 512, config.text_dim)
    output = transformer(inputs, torch.tensor([500.0]), text, encoder_hidden_states_image=image, return_dict=False)[0]
    output.square().mean().backward()
    assert output.std() > 0.1
    dead = [name for name, weight in transformer.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not dead


def test_scale_multiplies_width_and_depth(tmp_path):
    write_tiny("wan-t2v", tmp_path, "released", seed=0, scale=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[name] for name in ("dim", "num_heads", "ffn_dim", "num_layers")] == [72, 6, 144, 12]
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.get_slice("blocks.11.self_attn.q.weight").get_shape() == [72, 72]
        assert file.get_slice("text_embedding.0.weight").get_shape() == [72, 32]


@pytest.mark.parametrize("text", ["a cat on the red dog", "Größe: 3 × 4, “naïve” 自行车 🚲", "tab\tand\nline", "", "two  spaces "])
def test_made_tokenizer_returns_any_text(tmp_path, text):
    write_t5_tokenizer(tmp_path)
    tokenize = find_tokenizer(tmp_path).load(max_tokens=512)
    ids = tokenize(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == ids
    assert ids[-1] == theirs.eos_token_id == 1
    assert theirs.unk_token_id not in ids
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert len(theirs) == tokenize.vocabulary < 400
    assert theirs("a", padding="max_length", max_length=4).input_ids[-1] == theirs.pad_token_id == 0


def test_real_tokenizer_is_copied_and_fits(tmp_path, assets):
    write_tiny("wan-t2v", tmp_path, "released", seed=0, tokenizer=assets.umt5_tokenizer)
    copied = tmp_path / "google/umt5-xxl/tokenizer.json"
    assert copied.read_bytes() == (assets.umt5_tokenizer / "tokenizer.json").read_bytes()
    state = torch.load(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    assert state["token_embedding.weight"].shape == (256384, 32)  # as in the release: 256300 tokens, rounded up


def test_command(tmp_path, process_environment):
    out = tmp_path / "new" / "model"
    command = [sys.executable, "-m", "models.tiny", "wan-t2v", str(out), "--layout", "comfy", "--seed", "4"]
    written = subprocess.run(command, env=process_environment, capture_output=True, text=True, check=True)
    assert written.stdout.splitlines()[-1] == f"{out}: a tiny wan-t2v in the comfy layout"
    told = json.loads((out / tiny.MARK).read_text())
    assert [told[name] for name in ("variant", "layout", "seed", "scale")] == ["wan-t2v", "comfy", 4, 1]
    assert "vae/wan_2.1_vae.safetensors" in told["files"]


def test_list(caplog):
    caplog.set_level("INFO", logger="models.tiny")
    assert tiny.main(["--list"]) == 0
    assert caplog.messages == sorted(tiny.variants())


def test_a_name_without_a_folder():
    with pytest.raises(SystemExit) as stopped:
        tiny.main(["wan-t2v"])
    assert stopped.value.code == 2


def test_unknown_name(tmp_path):
    with pytest.raises(UserError, match=r"no tiny model 'wan-tv2'; did you mean wan-t2v\?.*wan-i2v, wan-t2v"):
        tiny.write("wan-tv2", tmp_path)
    assert tiny.main(["wan-tv2", str(tmp_path)]) == 2
    assert not any(tmp_path.iterdir())


def test_bad_scale_and_no_folder(tmp_path):
    with pytest.raises(UserError, match="--scale 0"):
        tiny.write("wan-t2v", tmp_path, scale=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        tiny.write("wan-t2v", tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        tiny.write("wan-t2v", tmp_path / "file" / "below")


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no tiny model"):
            tiny.write("wan-t2v", tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_a_tiny_model_and_only_that(tmp_path):
    tiny.write("wan-t2v", tmp_path, "comfy")
    with pytest.raises(UserError, match="holds a tiny model already; --force"):
        tiny.write("wan-t2v", tmp_path, "released")
    tiny.write("wan-t2v", tmp_path, "released", force=True)
    assert contents(tmp_path).keys() == {tiny.MARK, *FILES["released", "wan-t2v"].split()}

    (tmp_path / "google/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files too: google/notes\.txt"):
        tiny.write("wan-t2v", tmp_path, force=True)
    assert (tmp_path / "google/notes.txt").read_text() == "mine"
