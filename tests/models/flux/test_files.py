"""Finding the parts of a FLUX.1 model in each layout, and what is said when something is missing or does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from models.common.clip import clip_text_network
from models.common.t5 import t5_config
from models.flux.family import FluxOptions
from models.flux.files import find_files
from models.flux.networks import NETWORKS, VAE_SCALE, transformer_config
from models.flux.tiny import VARIANTS, write_tiny
from utils.errors import UserError
from utils.weights.tensor_files import TensorInfo

LAYOUTS = ("diffusers", "released", "comfy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of each (layout, variant); not to be changed by tests."""
    root = tmp_path_factory.mktemp("flux")
    for layout in LAYOUTS:
        for variant in VARIANTS:
            write_tiny(variant, root / layout / variant, layout, seed=0)
    return root


@pytest.fixture
def model(models, tmp_path):
    """A copy of a model that a test may spoil."""

    def copy(layout, variant="flux1-dev"):
        return Path(shutil.copytree(models / layout / variant, tmp_path / layout))

    return copy


def options(**keys):
    return FluxOptions(type="flux", **keys)


def error_of(**keys):
    with pytest.raises(UserError) as caught:
        find_files(options(**keys))
    return str(caught.value)


def on_meta(build):
    with torch.device("meta"):
        return build()


def names_of(model):
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_means_the_same_networks(models, layout, variant):
    files, expected = (find_files(options(path=models / folder / variant)) for folder in (layout, "diffusers"))
    assert files.variant == variant
    saved = FluxTransformer2DModel.load_config(models / "diffusers" / variant / "transformer")
    assert {name: saved[name] for name in files.transformer.config} == json.loads(json.dumps(files.transformer.config))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        found, wanted = getattr(files, part), getattr(expected, part)
        assert found.source.names().keys() == wanted.source.names().keys()
        assert all(torch.equal(found.source.read(name), wanted.source.read(name)) for name in wanted.source.names())
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert str(getattr(files, part).on_meta()) == str(getattr(expected, part).on_meta()), part
    scales = ("scaling_factor", "shift_factor", "latent_channels")
    assert [files.vae.config[name] for name in scales] == [expected.vae.config[name] for name in scales] == [0.3611, 0.1159, 16]


def all_in_one(models, path):
    """A checkpoint as ComfyUI's example ``flux1-dev-fp8.safetensors``, with what such files hold besides."""
    comfy = models / "comfy/flux1-dev"
    parts = {
        "model.diffusion_model.": "diffusion_models/flux1-dev.safetensors",
        "vae.": "vae/ae.safetensors",
        "text_encoders.clip_l.transformer.": "text_encoders/clip_l.safetensors",
        "text_encoders.t5xxl.transformer.": "text_encoders/t5xxl_fp16.safetensors",
    }
    state = {prefix + name: tensor for prefix, file in parts.items() for name, tensor in load_file(comfy / file).items()}
    state["text_encoders.clip_l.logit_scale"] = torch.zeros(())
    state["text_encoders.clip_l.transformer.text_projection.weight"] = torch.zeros(128, 128)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def test_an_all_in_one_checkpoint_is_enough(models, tmp_path):
    diffusers = models / "diffusers/flux1-dev"
    all_in_one(models, tmp_path / "checkpoints/flux1-dev-fp8.safetensors")
    tokenizers = {"tokenizer_path": diffusers / "tokenizer", "tokenizer_2_path": diffusers / "tokenizer_2"}
    expected = find_files(options(path=diffusers))
    for chosen in ({"path": tmp_path}, {"transformer_path": tmp_path / "checkpoints/flux1-dev-fp8.safetensors"}):
        files = find_files(options(**chosen, **tokenizers))
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            found, wanted = getattr(files, part), getattr(expected, part)
            assert found.source.names() == wanted.source.names()


def test_single_files_need_no_folder(models):
    comfy, released = models / "comfy/flux1-kontext", models / "released/flux1-kontext"
    files = find_files(
        options(
            transformer_path=comfy / "diffusion_models/flux1-dev-kontext.safetensors",
            vae_path=released / "ae.safetensors",
            text_encoder_path=comfy / "text_encoders/clip_l.safetensors",
            text_encoder_2_path=comfy / "text_encoders/t5xxl_fp16.safetensors",
        )
    )
    assert files.variant == "flux1-kontext"
    assert files.tokenizer.path == comfy / "text_encoders/clip-vit-large-patch14/vocab.json"  # beside the text encoder
    assert files.tokenizer_2.path == comfy / "text_encoders/t5-v1_1-xxl/tokenizer.json"


def test_released_sizes_are_read_from_the_tensors_alone():
    for guidance in (True, False):
        # The defaults are the release's.
        model = on_meta(lambda guidance=guidance: FluxTransformer2DModel(guidance_embeds=guidance))
        config = transformer_config(names_of(model), None)
        assert config == {name: model.config[name] for name in config}
    xxl = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    found = t5_config(names_of(on_meta(lambda: T5EncoderModel(T5Config(**xxl, feed_forward_proj="gated-gelu")))), None)
    assert {name: found[name] for name in xxl} == xxl
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    network = clip_text_network("CLIP", projection=False, activation="quick_gelu")
    found = network.config(names_of(on_meta(lambda: CLIPTextModel(CLIPTextConfig(vocab_size=49408, **large)))), None)
    assert {name: found[name] for name in large} == large
    assert (found["bos_token_id"], found["eos_token_id"], network.width(found)) == (49406, 49407, 768)


def test_the_released_vae_is_read_from_the_tensors_alone():
    """The config of ``vae/`` in FLUX.1-dev."""
    released = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    config = NETWORKS["vae"].config(names_of(on_meta(lambda: AutoencoderKL(**released))), None)
    assert json.loads(json.dumps({name: config[name] for name in released})) == released


@pytest.mark.parametrize(("name", "variant"), [("flux1-kontext-dev", "flux1-kontext"), ("my_model", "flux1-dev")])
def test_kontext_is_told_by_the_name_and_the_key_overrides_it(model, name, variant):
    folder = model("released")
    (folder / "flux1-dev.safetensors").rename(folder / f"{name}.safetensors")
    assert find_files(options(path=folder)).variant == variant
    for chosen in ("dev", "kontext"):
        assert find_files(options(path=folder, variant=chosen)).variant == f"flux1-{chosen}"


def test_schnell_is_not_kontext(models):
    message = error_of(path=models / "released/flux1-schnell", variant="kontext")
    assert "model.variant = 'kontext'" in message
    assert "no guidance embedder" in message


def test_all_that_is_missing_is_said_at_once(tmp_path):
    message = error_of(path=tmp_path)
    for key in ("transformer_path", "vae_path", "text_encoder_path", "text_encoder_2_path", "tokenizer_path", "tokenizer_2_path"):
        assert f"model.{key}" in message, key
    assert "openai/clip-vit-large-patch14" in message
    assert "google/t5-v1_1-xxl" in message


def test_a_tokenizer_without_its_merges(model):
    folder = model("comfy")
    (folder / "text_encoders/clip-vit-large-patch14/merges.txt").unlink()
    assert "vocab.json has no merges.txt beside it" in error_of(path=folder)


def test_fill_is_refused_by_name(model):
    folder = model("released")
    file = folder / "flux1-dev.safetensors"
    state = load_file(file)
    save_file({**state, "img_in.weight": torch.zeros(64, 384)}, file)
    assert "FLUX.1 Fill, which is not trained here" in error_of(path=folder)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"], "FLUX.2"),
        (["joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["blocks.0.self_attn.q.weight", "head.modulation"], "Wan"),
    ],
)
def test_a_model_of_another_family_is_told(models, tmp_path, names, told):
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "model.safetensors")
    message = error_of(path=models / "comfy/flux1-dev", transformer_path=tmp_path / "model.safetensors")
    assert f"holds {told}, which type = 'flux' does not train" in message


def test_parts_of_another_width_are_refused(model):
    folder = model("diffusers")
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, **VAE_SCALE)
    t5 = T5EncoderModel(T5Config(vocab_size=10, d_model=48, d_kv=8, d_ff=8, num_layers=1, feed_forward_proj="gated-gelu"))
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_2")
    vae.save_pretrained(folder / "vae")
    t5.save_pretrained(folder / "text_encoder_2")
    message = error_of(path=folder)
    assert "has the width 4, the transformer wants 16" in message
    assert "has the width 48, the transformer wants 32" in message


def test_a_config_of_another_model_is_refused(model):
    folder = model("diffusers")
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 19}))
    assert "num_layers: 19 in config.json, 3 by the weights" in error_of(path=folder)
