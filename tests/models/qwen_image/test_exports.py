"""What an export of Qwen-Image holds besides the transformer, and LoRAs in the spellings that people have."""

import shutil

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import load_family
from models.qwen_image.files import VARIANTS
from models.qwen_image.keys import EDIT_2511_MARK
from tests.models.qwen_image import reference
from utils.draw import Draw
from utils.formats.adapter_files import read_adapter
from utils.formats.export import TrainingFacts, export_full

Family = load_family("qwen_image")
FACTS = TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-3, seed=0)


def family_of(folder, **options):
    return Family(Family.Options(type="qwen_image", path=folder, dtype="float32", **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_export_is_the_same_model_in_diffusers_and_says_what_it_is(tiny_qwen, tmp_path, variant):
    folder = tiny_qwen(variant)
    family = family_of(folder)
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    file = export_full(
        tmp_path,
        "full",
        state,
        expected={name: tuple(tensor.shape) for name, tensor in state.items()},
        key_map=family.key_map(),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
        companions=family.companions(),
    )
    with safe_open(file, framework="pt") as opened:
        marked = sorted(set(opened.keys()) - state.keys())
        assert marked == ([EDIT_2511_MARK] if variant == "qwen-image-edit-2511" else [])
        assert all(opened.get_tensor(key).numel() == 0 for key in marked)
        assert opened.metadata()["modelspec.architecture"] == variant
    # Read by us, it is the same variant, whatever the folder beside it is; read by diffusers, the same model.
    shutil.copy(folder / "transformer/config.json", file.with_suffix(".json"))
    other = tiny_qwen("qwen-image" if variant != "qwen-image" else "qwen-image-edit")
    assert family_of(other, transformer_path=file).variant == variant
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    read = QwenImageTransformer2DModel.from_single_file(file, config=str(folder / "transformer"))
    with torch.no_grad():
        assert torch.equal(reference.predict(read, inputs), reference.predict(reference.plain_model(folder), inputs))


@pytest.mark.parametrize(
    "key", ["diffusion_model.{}.{}.lora_{}.weight", "transformer.{}.{}.lora_{}.weight", "lora_unet_{}_{}.lora_{}.weight"]
)
def test_loras_of_other_trainers_are_read(tiny_qwen, tmp_path, key):
    family = family_of(tiny_qwen("qwen-image"))
    block, module = "transformer_blocks.1", "attn.add_q_proj"
    kohya = key.startswith("lora_unet")
    parts = [part.replace(".", "_") if kohya else part for part in (block, module)]
    sides = {"down": torch.randn(4, 32), "up": torch.randn(32, 4)} if kohya else {"A": torch.randn(4, 32), "B": torch.randn(32, 4)}
    tensors = {key.format(*parts, side): tensor for side, tensor in sides.items()}
    save_file(
        {**tensors, key.format(*parts, "X").replace("lora_X.weight", "alpha"): torch.tensor(8.0)}, tmp_path / "lora.safetensors"
    )
    modules = [name.removesuffix(".weight") for name, info in family.weights().names().items() if len(info.shape) == 2]
    read = read_adapter(tmp_path / "lora.safetensors", modules, family.key_map())
    assert read.scales == {f"{block}.{module}": 2.0}
    first, second = sides.values()
    assert torch.equal(read.weights[f"{block}.{module}.lora_A.weight"], first)
    assert torch.equal(read.weights[f"{block}.{module}.lora_B.weight"], second)
