"""Finding the parts of a Wan model in each layout, and what is said when something is missing or does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.common.networks import open_network
from models.wan import sizes
from models.wan.files import find_files, transformer_config, variant_of
from models.wan.keys import wan_key_map
from models.wan.networks import NETWORKS
from models.wan.options import WanOptions
from models.wan.tiny import VARIANTS, write_tiny
from models.wan.variants import expert_named
from utils.errors import UserError
from utils.weights.named import WeightSource
from utils.weights.tensor_files import TensorInfo

LAYOUTS = ("diffusers", "released", "comfy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of each (layout, variant); not to be changed by tests."""
    root = tmp_path_factory.mktemp("wan")
    for layout in LAYOUTS:
        for variant in VARIANTS:
            write_tiny(variant, root / layout / variant, layout, seed=0)
    return root


@pytest.fixture
def model(models, tmp_path):
    """A copy of an image-to-video model that a test may spoil."""

    def copy(layout):
        return Path(shutil.copytree(models / layout / "wan-i2v", tmp_path / layout))

    return copy


def options(**keys):
    return WanOptions(type="wan", **keys)


def error_of(**keys):
    with pytest.raises(UserError) as caught:
        find_files(options(**keys))
    return str(caught.value)


def names_of(build):
    with torch.device("meta"):
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in build().state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_means_the_same_transformer(models, layout, variant):
    files = find_files(options(path=models / layout / variant))
    config = transformer_config(files)
    assert variant_of(config, files.expert) == variant
    assert files.expert == ("both" if variant.startswith("wan22") else None)
    assert (files.image_encoder is not None) == (variant in ("wan-i2v", "wan-flf2v"))
    saved = WanTransformer3DModel.load_config(models / "diffusers" / variant / "transformer")
    built = dict(WanTransformer3DModel.from_config(config).config)
    assert {name: saved[name] for name in config} == {name: json.loads(json.dumps(built[name])) for name in config}

    found = {"transformer": files.transformer, "transformer_2": files.transformer_2}
    assert (files.transformer_2 is not None) == (files.expert == "both")
    for name in filter(found.get, found):
        source = WeightSource(found[name], wan_key_map())
        expected = load_file(models / "diffusers" / variant / name / "diffusion_pytorch_model.safetensors")
        assert source.names().keys() == expected.keys()
        assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_single_files_need_no_folder(models):
    comfy, released = models / "comfy/wan-i2v", models / "released/wan-i2v"
    files = find_files(
        options(
            transformer_path=comfy / "diffusion_models/wan2.1_i2v_tiny.safetensors",
            vae_path=released / "Wan2.1_VAE.pth",
            text_encoder_path=comfy / "text_encoders/umt5_xxl_fp16.safetensors",
            image_encoder_path=released / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        )
    )
    assert files.vae == released / "Wan2.1_VAE.pth"
    assert files.tokenizer.path == comfy / "text_encoders/umt5-xxl/tokenizer.json"  # beside the text encoder
    assert variant_of(transformer_config(files)) == "wan-i2v"


def test_a_named_part_overrides_the_folder(models):
    diffusers, released = models / "diffusers/wan-i2v", models / "released/wan-i2v"
    files = find_files(options(path=diffusers, vae_path=released / "Wan2.1_VAE.pth", tokenizer_path=released / "google/umt5-xxl"))
    assert files.vae == released / "Wan2.1_VAE.pth"
    assert files.tokenizer.path == released / "google/umt5-xxl/tokenizer.json"
    assert files.transformer == diffusers / "transformer"
    assert files.image_processor == diffusers / "image_processor/preprocessor_config.json"


def test_a_flat_folder_of_comfy_files(models, tmp_path):
    for file in (models / "comfy/wan-i2v").rglob("*"):
        if file.is_file():
            shutil.copy(file, tmp_path / file.name)
    files = find_files(options(path=tmp_path))
    assert [files.transformer.name, files.vae.name] == ["wan2.1_i2v_tiny.safetensors", "wan_2.1_vae.safetensors"]
    assert [files.text_encoder.name, files.image_encoder.name] == ["umt5_xxl_fp16.safetensors", "clip_vision_h.safetensors"]


def test_checkpoint_prefix(model):
    path = model("comfy") / "diffusion_models/wan2.1_i2v_tiny.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(path).items()}, path)
    files = find_files(options(path=path.parents[1]))
    assert transformer_config(files)["in_channels"] == 36


@pytest.mark.parametrize("variant", ["wan-t2v", "wan-ti2v", "wan22-i2v"])
def test_all_in_one_checkpoint(models, tmp_path, variant):
    comfy = models / "comfy" / variant
    expert = "_low_noise" if variant.startswith("wan22") else ""
    [transformer] = (comfy / "diffusion_models").glob(f"*{expert}_tiny.safetensors")
    [vae] = (comfy / "vae").iterdir()
    parts = {
        "model.diffusion_model.": transformer,
        "vae.": vae,
        "text_encoders.umt5xxl.transformer.": comfy / "text_encoders/umt5_xxl_fp16.safetensors",
    }
    state = {prefix + name: tensor for prefix, file in parts.items() for name, tensor in load_file(file).items()}
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / f"checkpoints/wan{expert}.safetensors"
    save_file(state, checkpoint)
    shutil.copy(transformer.with_suffix(".json"), checkpoint.with_suffix(".json"))
    files = find_files(options(path=tmp_path, tokenizer_path=comfy / "text_encoders/umt5-xxl"))
    assert (files.transformer, files.vae, files.text_encoder) == (checkpoint, checkpoint, checkpoint)
    assert files.expert == ("low" if expert else None)
    apart = find_files(options(path=comfy, transformer_path=transformer))
    for part, network in NETWORKS.items():
        if part != "image_encoder":
            ours, theirs = (open_network(network, getattr(found, part)) for found in (files, apart))
            assert ours.config == theirs.config
            assert all(torch.equal(ours.source.read(name), theirs.source.read(name)) for name in theirs.source.names())


def test_comfy_folder_with_files_of_other_models(model):
    """Each part is chosen by what the files hold: a FLUX VAE, a T5 of FLUX (no position bias above layer 0), a wider CLIP."""
    comfy = model("comfy")
    save_file({"encoder.down.0.block.0.conv1.weight": torch.zeros(4, 4)}, comfy / "vae/ae.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, comfy / "diffusion_models/flux1-dev.safetensors")
    text = load_file(comfy / "text_encoders/umt5_xxl_fp16.safetensors")
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({name: tensor for name, tensor in text.items() if name != bias}, comfy / "text_encoders/t5xxl_fp16.safetensors")
    wider = CLIPVisionConfig(hidden_size=240, intermediate_size=240, num_hidden_layers=2, num_attention_heads=3, patch_size=14)
    state = {f"vision_model.{name}": tensor for name, tensor in CLIPVisionModel(wider).state_dict().items()}
    save_file(state, comfy / "clip_vision/clip_vision_g.safetensors")

    files = find_files(options(path=comfy))
    assert [files.vae.name, files.text_encoder.name] == ["wan_2.1_vae.safetensors", "umt5_xxl_fp16.safetensors"]
    assert [files.transformer.name, files.image_encoder.name] == ["wan2.1_i2v_tiny.safetensors", "clip_vision_h.safetensors"]


def test_released_sizes_are_read_from_the_tensors_alone():
    large = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    for given in (
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {**large, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        {**large, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
        {**large, "in_channels": 36},
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ):
        with torch.device("meta"):
            module = WanTransformer3DModel(**given)
        names = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}
        config = sizes.transformer_config(names, None)
        assert config == {name: module.config[name] for name in config}

    umt5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = sizes.t5_config(names_of(lambda: UMT5EncoderModel(UMT5Config(**umt5))), None)
    assert config == {"tie_word_embeddings": True, "relative_attention_num_buckets": 32, **umt5}

    clip = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
    config = sizes.clip_config(names_of(lambda: CLIPVisionModel(CLIPVisionConfig(**clip))), None)
    assert config == {**clip, "image_size": 224, "hidden_act": "gelu"}
    assert sizes.vae_config(names_of(AutoencoderKLWan), None) == {"base_dim": 96, "z_dim": 16}


def test_all_missing_parts_are_reported_together(model):
    folder = model("released")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"):
        (folder / name).unlink()
    shutil.rmtree(folder / "google")
    message = error_of(path=folder)
    for key in ("vae", "text_encoder", "image_encoder", "tokenizer"):
        assert f"model.{key}_path" in message
    assert "model.transformer_path" not in message
    assert f"no Wan VAE in {folder}; looked for vae/diffusion_pytorch_model*.safetensors, Wan2.*_VAE.pth" in message
    assert "google/umt5-xxl" in message
    assert "https://huggingface.co/google/umt5-xxl" in message


def test_nothing_named():
    message = error_of()
    assert [line for line in message.splitlines() if "set model.path (a folder) or model.vae_path" in line]
    assert "no tokenizer; name its folder with model.tokenizer_path" in message


def test_a_path_that_is_no_folder(models, tmp_path):
    assert f"model.path = {tmp_path / 'gone'} does not exist" in error_of(path=tmp_path / "gone")
    file = models / "comfy/wan-t2v/vae/wan_2.1_vae.safetensors"
    assert "is a file; single files are named with model.transformer_path" in error_of(path=file)


def test_several_candidates(model):
    comfy = model("comfy")
    for ending in ("safetensors", "json"):
        shutil.copy(comfy / f"diffusion_models/wan2.1_i2v_tiny.{ending}", comfy / f"diffusion_models/other.{ending}")
    message = error_of(path=comfy)
    assert "diffusion_models/other.safetensors, diffusion_models/wan2.1_i2v_tiny.safetensors" in message
    assert "choose one with model.transformer_path" in message
    chosen = comfy / "diffusion_models/other.safetensors"
    assert find_files(options(path=comfy, transformer_path=chosen)).transformer == chosen


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
def test_truncated_safetensors(model, name):
    file = model("diffusers") / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    message = error_of(path=file.parents[1])
    assert f"{file} has {len(content) // 2} bytes; by its header it should have {len(content)}" in message


def test_truncated_pth(model):
    file = model("released") / "Wan2.1_VAE.pth"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    message = error_of(path=file.parent)
    assert "name it with model.vae_path" in message
    assert f"{file} is not a whole file" in message


def test_incomplete_part(model):
    file = model("comfy") / "text_encoders/umt5_xxl_fp16.safetensors"
    state = load_file(file)
    del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(state, file)
    message = error_of(text_encoder_path=file)
    assert f"model.text_encoder_path: {file} is not a whole UMT5 text encoder" in message
    assert "1 weight is missing: encoder.block.1.layer.1.DenseReluDense.wo.weight" in message


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX or HunyuanVideo"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("txt_norm.weight", "Qwen-Image"),
    ],
)
def test_weights_of_another_family(models, tmp_path, key, what):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4)}, file)
    message = error_of(path=models / "comfy/wan-t2v", transformer_path=file)
    assert f"model.transformer_path: {file} holds {what}, which type = 'wan' does not train" in message


def test_a_part_of_wan_under_the_wrong_key(models):
    comfy = models / "comfy/wan-t2v"
    message = error_of(path=comfy, transformer_path=comfy / "vae/wan_2.1_vae.safetensors")
    assert "does not hold weights of this model" in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state | {"vace_blocks.0.before_proj.weight": torch.zeros(1)}, "Wan VACE"),
        (lambda state: state | {"patch_embedding.weight": torch.zeros(24, 48, 1, 2, 2)}, "Wan Fun Control"),
        (
            lambda state: state | {"patch_embedding.weight": torch.zeros(24, 20, 1, 2, 2)},
            "an unknown Wan model with 20 channels in",
        ),
    ],
)
def test_other_models_of_wan_are_recognised(model, change, what):
    file = model("comfy") / "diffusion_models/wan2.1_i2v_tiny.safetensors"
    config = json.loads(file.with_suffix(".json").read_text())
    del config["in_dim"]
    file.with_suffix(".json").write_text(json.dumps(config))
    save_file(change(load_file(file)), file)
    message = error_of(path=file.parents[1])
    assert what in message
    assert "which is not supported yet" in message or "which type = 'wan' does not train" in message


NAMED_EXPERTS = {
    "diffusers": {"high": "transformer", "low": "transformer_2"},
    "released": {"high": "high_noise_model", "low": "low_noise_model"},
    "comfy": {expert: f"diffusion_models/wan2.2_{{kind}}_{expert}_noise_tiny.safetensors" for expert in ("high", "low")},
}


@pytest.mark.parametrize("variant", ["wan22-t2v", "wan22-i2v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_expert_is_found_or_both(models, layout, variant):
    root = models / layout / variant
    places = {expert: root / name.format(kind=variant.removeprefix("wan22-")) for expert, name in NAMED_EXPERTS[layout].items()}
    for expert, place in places.items():
        chosen = find_files(options(path=root, expert=expert))
        named = find_files(options(path=root, transformer_path=place))
        for files in (chosen, named):
            assert (files.transformer, files.transformer_2, files.expert) == (place, None, expert)
    paths = {"transformer_path": places["high"], "transformer_2_path": places["low"]}
    for keys in ({}, {"expert": "both"}, paths, {"transformer_2_path": places["low"]}):
        files = find_files(options(path=root, **keys))
        assert (files.transformer, files.transformer_2, files.expert) == (places["high"], places["low"], "both")
    files = find_files(options(path=root, expert="low", **paths))
    assert (files.transformer, files.transformer_2, files.expert) == (places["low"], None, "low")


def test_a_folder_with_one_expert(models, tmp_path):
    comfy = Path(shutil.copytree(models / "comfy/wan22-t2v", tmp_path / "comfy"))
    high, low = (next((comfy / "diffusion_models").glob(f"*_{expert}_noise_*.safetensors")) for expert in ("high", "low"))
    high.unlink()
    assert find_files(options(path=comfy)).expert == "low"
    message = error_of(path=comfy, expert="both")
    assert "no Wan transformer for high noise" in message
    assert "name it with model.transformer_path" in message
    low.with_suffix(".json").rename(tmp_path / low.with_suffix(".json").name)
    kept = low.rename(tmp_path / low.name)
    message = error_of(path=comfy, transformer_path=kept, expert="both")
    assert "no Wan transformer for low noise" in message
    assert "name it with model.transformer_2_path" in message
    assert (
        f"model.transformer_path is the transformer for high noise with model.expert = 'both', but by its name {kept} is the one "
        "for low noise" in message
    )


def test_two_transformers_of_different_models(models):
    """By their config: the text-to-video model and the image-to-video model have other channels."""
    root = models / "released"
    paths = {"transformer_path": root / "wan22-t2v/high_noise_model", "transformer_2_path": root / "wan22-i2v/low_noise_model"}
    assert "the two transformers are not of one model: in_channels 16 and 36" in error_of(path=root / "wan22-t2v", **paths)


def test_one_file_for_both(models):
    root = models / "comfy/wan22-t2v"
    file = next((root / "diffusion_models").glob("*_high_noise_*.safetensors"))
    message = error_of(path=root, transformer_path=file, transformer_2_path=file)
    assert (
        f"model.transformer_2_path is the transformer for low noise with model.expert = 'both', but by its name {file}" in message
    )
    assert "model.transformer_path and model.transformer_2_path are the same" in message


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("Wan2_2-T2V-A14B_HIGH_fp16.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_bf16.safetensors", "low"),
        ("wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors", "low"),
        ("high_noise_model/diffusion_pytorch_model.safetensors", "high"),
        ("wan2.1_t2v_14B_lowvram.safetensors", None),
        ("highlights/wan2.1_i2v_480p_14B_fp16.safetensors", None),
        ("transformer", None),
    ],
)
def test_experts_by_name(tmp_path, name, expert):
    assert expert_named(tmp_path / name) == expert


@pytest.mark.parametrize("variant", ["wan22-t2v", "wan22-i2v"])
def test_a_file_whose_name_does_not_tell_the_expert(models, tmp_path, variant):
    """A text-to-video file alone is taken for Wan 2.1, whose shape it has; beside both experts it is not."""
    kind = variant.removeprefix("wan22-")
    file = tmp_path / "mine.safetensors"
    for ending in ("safetensors", "json"):
        source = models / "comfy" / variant / f"diffusion_models/wan2.2_{kind}_low_noise_tiny.{ending}"
        shutil.copy(source, file.with_suffix(f".{ending}"))
    root = models / "released" / variant
    assert "set model.expert to 'high' or 'low'" in error_of(path=root, transformer_path=file)
    assert find_files(options(path=root, transformer_path=file, expert="low")).expert == "low"
    assert find_files(options(path=root, transformer_path=root / "low_noise_model")).expert == "low"


def test_a_comfy_folder_with_experts_and_other_models(models, tmp_path):
    comfy = Path(shutil.copytree(models / "comfy/wan22-t2v", tmp_path / "comfy"))
    for ending in ("safetensors", "json"):
        source = models / f"comfy/wan-t2v/diffusion_models/wan2.1_t2v_tiny.{ending}"
        shutil.copy(source, comfy / "diffusion_models")
    assert "holds 3 that may be the Wan transformer" in error_of(path=comfy)
    files = find_files(options(path=comfy, expert="low"))
    assert files.transformer.name == "wan2.2_t2v_low_noise_tiny.safetensors"
    files = find_files(options(path=comfy, transformer_path=comfy / "diffusion_models/wan2.1_t2v_tiny.safetensors"))
    assert files.expert is None


def test_expert_of_a_model_that_has_none(models):
    root = models / "comfy/wan-i2v"
    file = root / "diffusion_models/wan2.1_i2v_tiny.safetensors"
    assert "this is Wan 2.1 image to video" in error_of(path=root, transformer_path=file, expert="high")
    for layout in LAYOUTS:
        assert "no Wan transformer for high noise in" in error_of(path=models / layout / "wan-t2v", expert="high")


def test_a_second_transformer_of_a_model_that_has_one(models):
    root = models / "comfy/wan-i2v"
    file = root / "diffusion_models/wan2.1_i2v_tiny.safetensors"
    message = error_of(path=root, transformer_path=file, transformer_2_path=file)
    assert f"model.transformer_2_path = '{file}' is for Wan 2.2 A14B, which has two transformers; this is Wan 2.1" in message


def test_expert_that_is_not_the_named_one(models):
    root = models / "released/wan22-t2v"
    message = error_of(path=root, transformer_path=root / "low_noise_model", expert="high")
    assert (
        "model.transformer_path is the transformer for high noise with model.expert = 'high', but by its name "
        f"{root / 'low_noise_model'} is the one for low noise" in message
    )


def test_first_frame_of_another_model(models):
    message = error_of(path=models / "released/wan-i2v", first_frame=True)
    assert "model.first_frame = true is for Wan 2.2 TI2V-5B; this is Wan 2.1 image to video" in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("variant", "other"), [("wan-ti2v", "wan-t2v"), ("wan-t2v", "wan-ti2v")])
def test_vae_of_the_other_version(models, layout, variant, other):
    widths = {"wan-ti2v": 48, "wan-t2v": 16}
    vae = find_files(options(path=models / layout / other)).vae
    message = error_of(path=models / layout / variant, vae_path=vae)
    assert f"{vae} has the width {widths[other]}, the transformer wants {widths[variant]}; it belongs to another model" in message


def test_comfy_folder_with_both_vaes(models, tmp_path):
    comfy = Path(shutil.copytree(models / "comfy/wan-ti2v", tmp_path / "comfy"))
    shutil.copy(models / "comfy/wan-t2v/vae/wan_2.1_vae.safetensors", comfy / "vae")
    assert find_files(options(path=comfy)).vae.name == "wan2.2_vae.safetensors"


def test_config_of_another_model(model):
    root = model("released")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "num_layers": 40, "dim": 5120}))
    message = error_of(path=root)
    assert "config.json is of another model" in message
    assert "num_layers: 40 in config.json, 4 by the weights" in message
    assert "dim: 5120 in config.json, 24 by the weights" in message


def test_unknown_number_of_heads(model):
    root = model("comfy")
    (root / "diffusion_models/wan2.1_i2v_tiny.json").unlink()
    assert "its width 24 is not a multiple of 128" in error_of(path=root)


def test_text_encoder_of_another_model(models, tmp_path):
    build = UMT5EncoderModel(UMT5Config(vocab_size=128, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    file = tmp_path / "other.safetensors"
    save_file({name: tensor for name, tensor in build.state_dict().items() if "embed_tokens" not in name}, file)
    message = error_of(path=models / "comfy/wan-t2v", text_encoder_path=file)
    assert f"{file} has the width 48, the transformer wants 32" in message


def test_image_encoder_for_text_to_video_warns(models, caplog):
    clip = models / "comfy/wan-i2v/clip_vision/clip_vision_h.safetensors"
    assert find_files(options(path=models / "comfy/wan-t2v", image_encoder_path=clip)).image_encoder is None
    assert "model.image_encoder_path has no effect" in caplog.text


def test_tokenizer_path_without_tokenizer(models, tmp_path):
    message = error_of(path=models / "released/wan-t2v", tokenizer_path=tmp_path)
    assert f"model.tokenizer_path = {tmp_path}: there is no tokenizer.json and no spiece.model" in message


def test_sentencepiece_is_asked_for_before_anything_is_loaded(model, monkeypatch):
    root = model("released")
    (root / "google/umt5-xxl/tokenizer.json").rename(root / "google/umt5-xxl/spiece.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = error_of(path=root)
    assert 'pip install "flowstage[sentencepiece]"' in message
    assert "model.tokenizer_path" in message
