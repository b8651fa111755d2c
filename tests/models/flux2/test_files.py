"""Finding the parts of a FLUX.2 model in each layout, and what is said when something is missing or does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
)

from models.common.networks import open_network
from models.flux2 import sizes
from models.flux2.encoder_keys import decoder_key_map, vae_key_map
from models.flux2.files import find_files
from models.flux2.keys import flux2_key_map
from models.flux2.networks import NETWORKS, DecoderWeights
from utils.config.schema import ModelOptions
from utils.errors import UserError
from utils.weights.named import WeightSource
from utils.weights.tensor_files import TensorInfo

LAYOUTS = ("diffusers", "released", "comfy")
TEXT_FILES = {"flux2-dev": "mistral_3_small_flux2_bf16", "flux2-klein": "qwen_3_4b"}
FILES = {"flux2-dev": "flux2-dev", "flux2-klein": "flux-2-klein-4b"}


def options(**keys):
    return ModelOptions(type="flux2", **keys)


def error_of(**keys):
    with pytest.raises(UserError) as caught:
        find_files(options(**keys))
    return str(caught.value)


def names_of(build):
    with torch.device("meta"):
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in build().state_dict().items()}


@pytest.fixture
def copy(flux2, tmp_path):
    """A copy of a tiny model that a test may spoil."""

    def copy(variant, layout) -> Path:
        return Path(shutil.copytree(flux2(variant, layout), tmp_path / variant / layout))

    return copy


# --- what is found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_means_the_same_model(flux2, variant, layout):
    files = find_files(options(path=flux2(variant, layout)))
    diffusers = flux2(variant)
    saved = Flux2Transformer2DModel.load_config(diffusers / "transformer")
    built = dict(Flux2Transformer2DModel.from_config(files.config).config)
    assert {name: saved[name] or built[name] for name in files.config} == {
        name: json.loads(json.dumps(built[name])) for name in files.config
    }
    for path, key_map, folder in (
        (files.transformer, flux2_key_map(), diffusers / "transformer"),
        (files.vae, NETWORKS["vae"].key_map(), diffusers / "vae"),
    ):
        source = WeightSource(path, key_map)
        expected = load_file(folder / "diffusion_pytorch_model.safetensors")
        expected.pop("bn.num_batches_tracked", None)
        assert source.names().keys() == expected.keys()
        assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    text, same = (DecoderWeights(path, decoder_key_map()) for path in (files.text_encoder, diffusers / "text_encoder"))
    assert text.names() == same.names()
    assert all(torch.equal(text.read(name), same.read(name)) for name in text.names())


def test_the_tiny_text_encoders_are_whole_for_transformers(flux2):
    kinds = {"flux2-dev": Mistral3ForConditionalGeneration, "flux2-klein": AutoModelForCausalLM}
    for variant, kind in kinds.items():
        _, info = kind.from_pretrained(flux2(variant) / "text_encoder", output_loading_info=True)
        assert {name: found for name, found in info.items() if found} == {}


def test_single_files_need_no_folder_but_a_tokenizer(flux2, variant):
    comfy, released = flux2(variant, "comfy"), flux2(variant, "released")
    files = {
        "transformer_path": comfy / f"diffusion_models/{FILES[variant]}.safetensors",
        "vae_path": released / "ae.safetensors",
        "text_encoder_path": comfy / f"text_encoders/{TEXT_FILES[variant]}.safetensors",
    }
    found = find_files(options(**files, tokenizer_path=comfy / "tokenizer"))
    assert found.vae == released / "ae.safetensors"
    assert found.tokenizer.folder == comfy / "tokenizer"
    message = error_of(**files)
    assert "no tokenizer" in message
    assert "model.tokenizer_path" in message
    assert "https://huggingface.co/black-forest-labs/FLUX.2-" in message


def test_an_all_in_one_checkpoint_is_enough_with_a_tokenizer(flux2, variant, tmp_path):
    comfy = flux2(variant, "comfy")
    encoder = {"flux2-dev": "mistral3_24b", "flux2-klein": "qwen3_4b"}[variant]
    vae = AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1).state_dict()
    parts = {
        "model.diffusion_model.": load_file(comfy / f"diffusion_models/{FILES[variant]}.safetensors"),
        "vae.": vae_key_map().to_released(vae) | {"bn.num_batches_tracked": torch.tensor(7)},
        f"text_encoders.{encoder}.transformer.": load_file(comfy / f"text_encoders/{TEXT_FILES[variant]}.safetensors"),
    }
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints/flux2.safetensors"
    save_file({prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}, file)
    # The tiny text encoder's heads are not as wide as the real one's.
    shutil.copy(comfy / f"text_encoders/{TEXT_FILES[variant]}.json", file.with_suffix(".json"))
    for keys in ({"path": tmp_path}, {"transformer_path": file}):
        found = find_files(options(**keys, tokenizer_path=comfy / "tokenizer"))
        assert found.transformer == found.vae == found.text_encoder == file
        text, same = (DecoderWeights(path, decoder_key_map()) for path in (file, flux2(variant) / "text_encoder"))
        assert all(torch.equal(text.read(name), same.read(name)) for name in same.names())
        opened = open_network(NETWORKS["vae"], file)
        assert all(torch.equal(opened.source.read(name), vae[name]) for name in opened.source.names())


def test_what_stands_beside_the_language_model_is_not_read(flux2):
    """ComfyUI's file has the tokenizer and the vision tower too."""
    source = DecoderWeights(flux2("flux2-dev", "comfy") / "text_encoders/mistral_3_small_flux2_bf16.safetensors", decoder_key_map())
    layers = {name.split(".")[1] for name in source.names() if name.startswith("layers.")}
    assert layers == {str(index) for index in range(30)}
    assert not {name for name in source.names() if not name.startswith(("layers.", "embed_tokens."))}


# --- the released sizes, from the tensors alone --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "doubles", "singles", "joint", "guidance"),
    [(48, 8, 48, 15360, True), (32, 8, 24, 12288, False), (24, 5, 20, 7680, False)],
    ids=["dev", "Klein 9B", "Klein 4B"],
)
def test_sizes_of_the_released_transformers(heads, doubles, singles, joint, guidance):
    with torch.device("meta"):
        real = Flux2Transformer2DModel(
            num_attention_heads=heads,
            num_layers=doubles,
            num_single_layers=singles,
            joint_attention_dim=joint,
            guidance_embeds=guidance,
        )
    config = sizes.transformer_config(names_of(lambda: real), None)
    expected = {**real.config, "out_channels": real.out_channels}
    assert config == {name: expected[name] for name in config}
    assert sizes.transformer_config(names_of(lambda: real), dict(real.config)) == config


@pytest.mark.parametrize("decoder", [None, (96, 192, 384, 384)], ids=["released", "small decoder"])
def test_sizes_of_the_released_vae(decoder):
    with torch.device("meta"):
        real = AutoencoderKLFlux2(decoder_block_out_channels=decoder)
        config = sizes.vae_config(names_of(lambda: real), None)
        ours = AutoencoderKLFlux2.from_config(config)
    assert config["decoder_block_out_channels"] == (decoder or (128, 256, 512, 512))
    assert names_of(lambda: ours) == names_of(lambda: real)
    assert (ours.config.norm_num_groups, ours.config.batch_norm_eps, ours.config.latent_channels) == (32, 1e-4, 32)


MISTRAL = {"vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 = {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


@pytest.mark.parametrize(
    ("build", "layers", "width", "rope", "eps"),
    [
        (lambda n: MistralModel(MistralConfig(num_hidden_layers=n, num_attention_heads=32, **MISTRAL)), 40, 15360, 1e9, 1e-5),
        (lambda n: MistralModel(MistralConfig(num_hidden_layers=n, num_attention_heads=32, **MISTRAL)), 30, 15360, 1e9, 1e-5),
        (
            lambda n: Qwen3Model(Qwen3Config(num_hidden_layers=n, hidden_size=2560, intermediate_size=9728, **QWEN3)),
            36,
            7680,
            1e6,
            1e-6,
        ),
        (
            lambda n: Qwen3Model(Qwen3Config(num_hidden_layers=n, hidden_size=4096, intermediate_size=12288, **QWEN3)),
            36,
            12288,
            1e6,
            1e-6,
        ),
    ],
    ids=["Mistral", "Mistral pruned", "Qwen3 4B", "Qwen3 8B"],
)
def test_sizes_of_the_released_text_encoders(build, layers, width, rope, eps):
    config = sizes.text_encoder_config(names_of(lambda: build(layers)), None)
    assert sizes.text_width(config) == width
    with torch.device("meta"):
        model = NETWORKS["text_encoder"].build(config)
        expected = build(config["num_hidden_layers"]).state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items() if name != "norm.weight"
    }
    assert model.config.rope_parameters["rope_theta"] == rope
    assert model.config.rms_norm_eps == eps
    assert not model.rotary_emb.inv_freq.is_meta


# --- what is said --------------------------------------------------------------------------------------------------------------


def test_everything_that_is_missing_is_told_at_once(tmp_path):
    message = error_of(path=tmp_path)
    for key in ("model.transformer_path", "model.vae_path", "model.text_encoder_path", "model.tokenizer_path"):
        assert key in message


def test_a_text_encoder_of_another_variant(flux2):
    message = error_of(path=flux2("flux2-dev"), text_encoder_path=flux2("flux2-klein") / "text_encoder")
    assert "has the width 24, the transformer wants 48; it belongs to another model" in message


def test_a_text_encoder_with_too_few_layers(copy):
    folder = copy("flux2-klein", "comfy")
    file = folder / "text_encoders/qwen_3_4b.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".layers.26." not in name}, file)
    message = error_of(path=folder)
    assert "not a whole text encoder" in message
    assert "layers.26." in message


def test_a_vae_of_another_latent_width(copy):
    folder = copy("flux2-klein", "released")
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=16)
    save_file(vae_key_map().to_released(vae.state_dict()), folder / "ae.safetensors")
    assert "has the width 64, the transformer wants 128" in error_of(path=folder)


def test_a_vae_whose_norms_cannot_be_told(copy):
    folder = copy("flux2-klein", "released")
    (folder / "ae.json").unlink()
    assert "are not multiples of 32, the number of groups of its norms" in error_of(path=folder)


def test_weights_of_another_family(flux2, tmp_path):
    save_file(
        {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2), "vector_in.in_layer.weight": torch.zeros(2, 2)},
        tmp_path / "flux1.safetensors",
    )
    message = error_of(path=flux2("flux2-dev"), transformer_path=tmp_path / "flux1.safetensors")
    assert "model.transformer_path" in message
    assert "flux1.safetensors" in message


def test_a_config_of_another_size(copy):
    folder = copy("flux2-klein", "diffusers")
    config = folder / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 8}))
    assert "num_layers: 8 in config.json, 3 by the weights" in error_of(path=folder)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}'),
            r"has no chat template",
        ),
    ],
    ids=["nothing", "no config", "no template"],
)
def test_a_tokenizer_that_cannot_be_used(copy, spoil, told, variant):
    folder = copy(variant, "diffusers")
    spoil(folder / "tokenizer")
    message = error_of(path=folder)
    assert told in message
    assert "tokenizer/ of https://huggingface.co/black-forest-labs/FLUX.2-" in message
