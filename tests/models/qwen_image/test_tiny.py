"""Tiny Qwen-Image models against the layouts of the release and of ComfyUI."""

import hashlib

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from models.common.text_encoders import QWEN_NAMES, QWEN_SPECIAL_TOKENS, find_tokenizer
from models.qwen_image.files import VARIANTS
from models.qwen_image.tiny import tiny_model, write_qwen_tokenizer, write_tiny

LAYOUTS = ("diffusers", "released", "comfy")
FILES = {
    ("diffusers", "qwen-image"): """
        model_index.json scheduler/scheduler_config.json
        transformer/config.json transformer/diffusion_pytorch_model.safetensors
        vae/config.json vae/diffusion_pytorch_model.safetensors
        text_encoder/config.json text_encoder/model.safetensors
        tokenizer/tokenizer.json tokenizer/tokenizer_config.json""",
    ("released", "qwen-image-edit-2511"): """
        model_index.json scheduler/scheduler_config.json
        transformer/config.json transformer/diffusion_pytorch_model.safetensors.index.json
        transformer/diffusion_pytorch_model-00001-of-00002.safetensors
        transformer/diffusion_pytorch_model-00002-of-00002.safetensors
        vae/config.json vae/diffusion_pytorch_model.safetensors
        text_encoder/config.json text_encoder/model.safetensors.index.json
        text_encoder/model-00001-of-00002.safetensors text_encoder/model-00002-of-00002.safetensors
        tokenizer/vocab.json tokenizer/merges.txt tokenizer/added_tokens.json tokenizer/tokenizer_config.json
        processor/preprocessor_config.json
        processor/vocab.json processor/merges.txt processor/added_tokens.json processor/tokenizer_config.json""",
    ("comfy", "qwen-image-edit-plus"): """
        diffusion_models/qwen_image_edit_2509_bf16.safetensors diffusion_models/qwen_image_edit_2509_bf16.json
        vae/qwen_image_vae.safetensors
        text_encoders/qwen_2.5_vl_7b.safetensors text_encoders/qwen_2.5_vl_7b.json
        text_encoders/qwen2.5-vl/tokenizer.json text_encoders/qwen2.5-vl/tokenizer_config.json""",
}
NOT_READ = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""What the last block does for the text."""


def contents(folder):
    """Hash of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("layout", "variant"), FILES)
def test_files_have_the_releases_names(tiny_qwen, layout, variant):
    assert contents(tiny_qwen(variant, layout)).keys() == set(FILES[layout, variant].split())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bytes_for_the_same_seed(tmp_path, layout):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        write_tiny("qwen-image-edit", tmp_path / name, layout, seed=seed)
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert all(one[name] != other[name] for name in one if name.endswith(".safetensors"))


def test_every_parameter_is_random(tmp_path):
    write_qwen_tokenizer(tmp_path, whole=True)
    model = tiny_model("qwen-image", tmp_path, seed=0, scale=1)
    for part in (model.transformer, model.vae, model.text_encoder):
        for name, tensor in part.state.items():
            assert tensor.unique().numel() > 0.99 * tensor.numel(), name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_it_whole_and_every_weight_matters(tiny_qwen, variant):
    folder = tiny_qwen(variant)
    transformer, report = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    grids = [(1, 2, 4), *([] if variant == "qwen-image" else [(1, 2, 2)])]
    tokens = sum(rows * columns for _, rows, columns in grids)
    output = transformer(
        torch.randn(1, tokens, 64), torch.randn(1, 5, 256), timestep=torch.tensor([0.5]), img_shapes=[grids], return_dict=False
    )[0]
    output.square().mean().backward()
    assert output.std() > 0.1
    dead = {name for name, weight in transformer.named_parameters() if weight.grad is None}
    assert dead == {f"transformer_blocks.3.{name}.{kind}" for name in NOT_READ for kind in ("weight", "bias")}
    # The query of the last block's text leads nowhere either; its gradient is zero.
    zero = {name for name, weight in transformer.named_parameters() if name not in dead and not weight.grad.any()}
    assert all(name.startswith(("transformer_blocks.3.attn.add_q_proj", "transformer_blocks.3.attn.norm_added_q")) for name in zero)


def test_scale_multiplies_width_and_depth(tmp_path):
    write_tiny("qwen-image", tmp_path, "diffusers", seed=0, scale=2)
    config = QwenImageTransformer2DModel.load_config(tmp_path / "transformer")
    assert [config[name] for name in ("num_attention_heads", "attention_head_dim", "num_layers")] == [4, 16, 8]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("text", ["a red cat", "Größe: 3 × 4, “naïve” 自行车 🚲", "tab\tand\nline", "", "two  <|im_end|> spaces "])
def test_made_tokenizer_returns_any_text(tmp_path, text, whole):
    write_qwen_tokenizer(tmp_path, whole)
    tokenize = find_tokenizer(tmp_path, QWEN_NAMES).load(max_tokens=512)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == tokenize(text)
    assert theirs.decode(tokenize(text)) == text
    assert len(theirs) == tokenize.vocabulary < 400
    ids = [tokenize(token) for token in QWEN_SPECIAL_TOKENS]
    assert ids == [[tokenize.vocabulary - len(QWEN_SPECIAL_TOKENS) + index] for index in range(len(QWEN_SPECIAL_TOKENS))]
