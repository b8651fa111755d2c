"""The command: exit codes, what it refuses, and whose file it takes a file for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_names
from utils.convert import known_families, main
from utils.formats.adapter_format import LoraFormat
from utils.formats.recognise import recognise_adapter
from utils.weights.tensor_files import TensorInfo


@pytest.fixture(scope="module")
def families():
    return known_families("models")


def lora(*modules, rank=2, width=8):
    return {
        f"{module}.{part}": torch.ones(shape)
        for module in modules
        for part, shape in (("lora_A.weight", (rank, width)), ("lora_B.weight", (width, rank)))
    }


def failed(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_unknown_keys_are_listed_and_nothing_is_written(tmp_path, capsys):
    strange = [f"lora_unet_single_blocks_0_linear{number}" for number in (3, 4)]
    known = [f"lora_unet_single_blocks_{block}_linear2" for block in range(4)]
    path = tmp_path / "x.safetensors"
    save_file({**lora(*known, *strange), "lora_unet_single_blocks_0_linear1.diff": torch.ones(2)}, path)
    text = failed(capsys, path, "--to", "diffusers", "--family", "flux")
    assert "is a LoRA of flux, but not all of it is understood, so it was not converted" in text
    assert "lora_unet_single_blocks_0_linear3.lora_A.weight belongs to no module of the model" in text
    assert "lora_unet_single_blocks_0_linear1.diff is a whole difference" in text
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert main([str(path)]) == 0
    told = capsys.readouterr().out
    assert "left over, of no known module: lora_unet_single_blocks_0_linear3.lora_A.weight" in told


def test_a_file_that_may_be_of_several_families(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file(lora("transformer.transformer_blocks.0.attn.to_out.0"), path)
    text = failed(capsys, path, "--to", "kohya")
    assert "may be of flux, flux2, qwen_image, sd3: its keys are the same in all of them; say which with --family" in text
    assert main([str(path), "--to", "kohya", "--family", "sd3"]) == 0
    assert list(load_file(tmp_path / "x-kohya.safetensors")) == [
        f"lora_unet_joint_blocks_0_x_block_attn_proj.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    # What the file says of itself settles it.
    save_file(lora("transformer.transformer_blocks.0.attn.to_out.0"), path, {"modelspec.architecture": "flux-1-dev/lora"})
    assert main([str(path)]) == 0
    assert "adapter of flux\n" in capsys.readouterr().out


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file(lora("diffusion_model.blocks.0.self_attn.q"), path)
    (tmp_path / "x-kohya.safetensors").write_text("mine")
    assert "exists; name another file with --out" in failed(capsys, path, "--to", "kohya")
    assert main([str(path), "--to", "kohya", "--out", str(tmp_path / "other.safetensors")]) == 0
    assert (tmp_path / "x-kohya.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors"], "nothing.safetensors does not exist"),
        (["strange.safetensors", "--to", "comfy"], "holds no model that is known here; it has 1 tensors such as a"),
        (["strange.safetensors", "--to", "kohya"], "kohya is a layout of LoRA files"),
        (["lora.safetensors", "--to", "comfy", "--family", "fluxx"], "there is no such family"),
        (["half.safetensors", "--to", "comfy"], "has no lora_B.weight"),
        (["broken.safetensors"], "is not a .safetensors file"),
        (["dora.safetensors", "--to", "peft"], "told by the base model's weights: name them with --base"),
        (["folder"], "holds no weights; name one of "),
    ],
)
def test_what_the_user_can_put_right(arguments, message, tmp_path, capsys):
    module = "diffusion_model.blocks.0.self_attn.q"
    save_file({"a": torch.ones(1)}, tmp_path / "strange.safetensors")
    save_file(lora(module), tmp_path / "lora.safetensors")
    save_file(dict([*lora(module).items()][:1]), tmp_path / "half.safetensors")
    save_file({**lora(module), f"{module}.dora_scale": torch.ones(8, 1)}, tmp_path / "dora.safetensors")
    (tmp_path / "broken.safetensors").write_text("?")
    (tmp_path / "folder/transformer").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "folder/transformer/x.safetensors")
    assert message in failed(capsys, tmp_path / arguments[0], *arguments[1:])


def test_peft_gets_its_config(tmp_path):
    modules = [f"diffusion_model.blocks.{block}.self_attn.q" for block in (0, 1)]
    save_file({**lora(modules[0]), **lora(modules[1], rank=4)}, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), "--to", "peft"]) == 0
    config = json.loads((tmp_path / "x-peft/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^blocks\.1\.attn1\.to_q": 4}
    # A folder of PEFT is a file of ours too.
    assert main([str(tmp_path / "x-peft"), "--to", "comfy", "--out", str(tmp_path / "again.safetensors")]) == 0
    first, second = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


ATTENTION = {"transformer_blocks.{}.attn.to_q": 1, "transformer_blocks.{}.attn.to_out.0": 1}
SPELLINGS = (LoraFormat("transformer.", "diffusers"), LoraFormat("lycoris_", "diffusers", "lora_down", "lora_up", "_"))


@pytest.mark.parametrize("fmt", SPELLINGS, ids=["transformer", "lycoris"])
@pytest.mark.parametrize(
    ("family", "blocks", "width"),
    [("flux", 19, 3072), ("flux2", 8, 6144), ("flux2", 5, 3072), ("qwen_image", 60, 3072), ("sd3", 24, 1536), ("sd3", 38, 2432)],
)
def test_models_of_the_same_names_are_told_by_their_size(family, blocks, width, fmt, families):
    """The attention alone has the same names in four families."""
    entries = {}
    for module in (name.format(block) for name in ATTENTION for block in range(blocks)):
        entries[fmt.key(module, f"{fmt.down}.weight")] = TensorInfo((16, width), torch.bfloat16)
        entries[fmt.key(module, f"{fmt.up}.weight")] = TensorInfo((width, 16), torch.bfloat16)
    [found] = recognise_adapter(entries, {}, families)
    assert found.family.name == family
    assert found.size == (blocks, width)
    assert not found.unknown


def test_every_family_knows_its_files(families):
    assert [family.name for family in families] == family_names()
    for family in families:
        assert next(iter(family.facts.networks)) == "transformer"
