"""``python -m utils.convert`` on every family: what it writes is read by the programs that it is for, and comes back as it was."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from models import family_names, load_family
from tests.models.comfy_adapters import patched
from tests.models.sd3.test_keys import REAL_VARIANTS as SD3_VARIANTS
from tests.models.sdxl.test_keys import REAL_UNET
from tests.models.test_adapters import RANK, Opened, in_diffusers
from utils.adapters.deltas import adapted
from utils.adapters.manager import adaptable_modules
from utils.convert import known_families, main
from utils.draw import generator
from utils.formats.adapter_convert import LayoutName, layout_format
from utils.formats.adapter_files import place_of, read_adapter
from utils.formats.adapter_layouts import by_module

KINDS = ("lora", "dora", "loha", "lokr")
DIFFUSERS_READS = {"flux2": ("lora", "dora", "lokr")}
"""Kinds that diffusers' loaders take, by family; of the others ``lora`` and ``dora``."""
FUSES = ("flux", "sd3")
"""Families with a default target that the release fuses, and whose ComfyUI names hold the parts one by one."""


@pytest.fixture(scope="module", params=family_names())
def opened(request, tmp_path_factory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp("model"))


def network_folder(opened: Opened) -> Path:
    return opened.folder / opened.family.file_facts.folder


def convert(*arguments) -> Path:
    """Convert, and return what was written."""
    assert main([str(argument) for argument in arguments]) == 0
    return Path(arguments[arguments.index("--out") + 1])


def in_comfy(opened: Opened, file: Path, prefix: str, separator: str) -> Tensor:
    """As ComfyUI computes it; keys with `transformer.` go by diffusers' names, on the rows that are theirs."""
    family, tensors = opened.family, load_file(file)
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith("transformer.")}
    state = {name: value.detach() for name, value in opened.plain().state_dict().items()}
    state = patched(state, "transformer.", ".", parts)
    rest = {key: tensor for key, tensor in tensors.items() if key not in parts}
    state = family.key_map().to_diffusers(patched(family.key_map().to_released(state), prefix, separator, rest))
    model = opened.plain()
    model.load_state_dict(state)
    return predicted(opened, model)


def predicted(opened: Opened, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return opened.reference.predict(model.eval(), opened.inputs)


def in_peft(opened: Opened, folder: Path) -> Tensor:
    return predicted(opened, PeftModel.from_pretrained(opened.plain(), folder).base_model.model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_read_by_its_program_at_the_same_strength(opened, kind, tmp_path, capsys):
    manager, _, layers, values = opened.adapted(opened.config(kind))
    with torch.no_grad():
        ours = opened.layered(layers)
    file = opened.export(tmp_path, manager, values)
    base = ("--base", network_folder(opened))

    comfy = convert(file, "--to", "comfy", "--out", tmp_path / "comfy.safetensors")
    prefix, separator = ("lora_unet_", "_") if opened.name == "sdxl" else ("diffusion_model.", ".")
    assert (in_comfy(opened, comfy, prefix, separator) - ours).abs().max() <= 1e-5

    kohya = tmp_path / "kohya.safetensors"
    fused = opened.name in FUSES and kind in ("loha", "lokr")
    assert main([str(comfy), "--to", "kohya", "--out", str(kohya)]) == 2 * fused
    if fused:
        assert "have adapters of kind" in capsys.readouterr().err
        assert not kohya.exists()
    else:
        assert (in_comfy(opened, kohya, "lora_unet_", "_") - ours).abs().max() <= 1e-5

    diffusers = tmp_path / "diffusers.safetensors"
    taken = kind in DIFFUSERS_READS.get(opened.name, ("lora", "dora"))
    assert main([str(comfy), "--to", "diffusers", "--out", str(diffusers), *map(str, base)]) == 2 * (not taken)
    if taken:
        assert (in_diffusers(opened, diffusers) - ours).abs().max() <= 1e-5
    else:
        assert f"takes no adapters of kind {kind}" in capsys.readouterr().err

    peft = convert(comfy, "--to", "peft", "--out", tmp_path / "peft", *base)
    assert (in_peft(opened, peft) - ours).abs().max() <= 1e-5
    again = convert(peft, "--to", "comfy", "--out", tmp_path / "again.safetensors", *base)
    first, second = load_file(comfy), load_file(again)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        # A magnitude is told by the norms of the weights, which are computed twice.
        assert torch.equal(second[key], tensor) or (kind == "dora" and torch.allclose(second[key], tensor, rtol=1e-5)), key


@pytest.mark.parametrize("ranks", ["one rank", "several"])
def test_diffusers_reads_kohyas_layout_where_it_can(opened, ranks, tmp_path):
    if opened.name == "sd3":
        pytest.skip("diffusers has no reader of kohya's names for SD3")
    config = opened.config("lora")
    if ranks == "one rank":
        config = config.model_copy(update={"override": []})
    if opened.name == "flux":  # its reader knows the single blocks of the real width only
        config = config.model_copy(update={"exclude_modules": r"single_transformer_blocks\..*"})
    manager, _, layers, values = opened.adapted(config)
    kohya = convert(opened.export(tmp_path, manager, values), "--to", "kohya", "--out", tmp_path / "kohya.safetensors")
    with torch.no_grad():
        ours = opened.layered(layers)
    assert (in_diffusers(opened, kohya) - ours).abs().max() <= 1e-5


def foreign_lora(opened: Opened, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA as other trainers make it, on every module of the release, fused or not; and its differences by diffusers name."""
    key_map, fmt = opened.family.key_map(), layout_format("comfy", known_families("models", opened.name)[0])
    weights = {name: torch.empty(info.shape, device="meta") for name, info in opened.family.weights().names().items()}
    tensors, differences = {}, {}
    for key, weight in key_map.to_released(weights).items():
        path = key.removesuffix(".weight")
        if key.endswith(".weight") and weight.ndim > 1 and key_map.place_of(path):
            random = generator("foreign", key)
            down = torch.randn(RANK, *weight.shape[1:], generator=random).to(dtype)
            up = torch.randn(len(weight), RANK, *(1 for _ in weight.shape[2:]), generator=random).to(dtype)
            tensors[fmt.key(path, f"{fmt.down}.weight")], tensors[fmt.key(path, f"{fmt.up}.weight")] = down, up
            tensors[fmt.key(path, "alpha")] = torch.tensor(3.0, dtype=dtype)
            differences[key] = (3.0 / RANK * up.float().flatten(1) @ down.float().flatten(1)).view(weight.shape)
    return tensors, key_map.to_diffusers(differences)


def test_a_lora_comes_back_bit_for_bit(opened, tmp_path):
    """Of bf16, with an alpha that is no power of two: what a layout cannot hold is not lost on the way."""
    tensors, differences = foreign_lora(opened, torch.bfloat16)
    save_file(tensors, tmp_path / "first.safetensors", {"ss_output_name": "first"})
    family = ("--family", opened.name)
    steps = {"diffusers": "diffusers.safetensors", "kohya": "kohya.safetensors", "peft": "peft", "comfy": "comfy.safetensors"}
    file = tmp_path / "first.safetensors"
    modules, key_map = adaptable_modules(opened.family.weights()), opened.family.key_map()
    for layout, name in steps.items():
        file = convert(file, "--to", layout, "--out", tmp_path / name, *family)
        path = file / "adapter_model.safetensors" if layout == "peft" else file
        read = read_adapter(path, modules, key_map)
        found = {
            module: {part: read.weights[name] for part, name in names.items()} for module, names in by_module(read.weights).items()
        }
        assert {f"{module}.weight" for module in found} == differences.keys()
        for module, parts in found.items():
            zeros = torch.zeros_like(differences[f"{module}.weight"])
            torch.testing.assert_close(adapted(zeros, "lora", parts, read.scales[module]), differences[f"{module}.weight"])
    again = load_file(file)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key], tensor), key
    with safe_open(file, framework="pt") as opened_file:
        assert opened_file.metadata()["ss_output_name"] == "first"


def comfy_file(opened: Opened, folder: Path) -> Path:
    """The same model as ComfyUI has it: its transformer's file."""
    type(opened.family).write_tiny(opened.family.variants[0], folder, "comfy", seed=0)
    return next(iter(sorted(folder.glob("diffusion_models/*.safetensors"))))


def test_a_full_model_in_both_layouts(opened, tmp_path, capsys):
    expected = comfy_file(opened, tmp_path / "model")
    made = convert(network_folder(opened), "--to", "comfy", "--out", tmp_path / "made.safetensors")
    first, second = load_file(expected), load_file(made)
    assert {key.removeprefix("model.diffusion_model.") for key in first} == second.keys()
    assert all(torch.equal(second[key.removeprefix("model.diffusion_model.")], tensor) for key, tensor in first.items())

    folder = convert(expected, "--to", "diffusers", "--out", tmp_path / "folder")
    plain = opened.plain()
    read = type(plain).from_pretrained(folder)
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state_dict().items())
    assert (predicted(opened, read) == predicted(opened, plain)).all()

    for path, layout in ((expected, "released names"), (folder, "diffusers names"), (made, "released names")):
        capsys.readouterr()
        assert main([str(path)]) == 0
        told = capsys.readouterr().out
        assert f"[{opened.name}]" in told
        assert layout in told or opened.name == "qwen_image"  # its names are the same
        assert "left over" not in told
    assert main([str(made), "--to", "kohya"]) == 2
    assert "a layout of LoRA files" in capsys.readouterr().err


@pytest.mark.parametrize("layout", get_args(LayoutName))
def test_inspect_tells_of_a_lora_in_each_layout(opened, layout, tmp_path, capsys):
    tensors, _ = foreign_lora(opened, torch.float16)
    save_file(tensors, tmp_path / "foreign.safetensors")
    file = convert(tmp_path / "foreign.safetensors", "--to", layout, "--out", tmp_path / "out.safetensors", "--family", opened.name)
    capsys.readouterr()
    assert main([str(file), "--inspect"]) == 0
    told = capsys.readouterr().out
    assert f"adapter of {opened.name}" in told
    assert f"layout: {'kohya' if opened.name == 'sdxl' and layout == 'comfy' else layout} " in told
    assert f"rank: {RANK} (" in told
    assert "left over" not in told
    assert ("strength: 0.75 (alpha 3)" in told) == (layout in ("comfy", "kohya"))
    assert ("strength: 1 (no alpha)" in told) == (layout in ("diffusers", "peft"))


REAL_MODELS = {
    "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "flux2": Flux2Transformer2DModel,
    "qwen_image": QwenImageTransformer2DModel,
    "sd3": lambda: SD3Transformer2DModel(**SD3_VARIANTS["sd35-medium"][0]),
    "sdxl": lambda: UNet2DConditionModel(**REAL_UNET),
    "wan": lambda: WanTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120, in_channels=36),
}


@pytest.mark.parametrize("name", REAL_MODELS)
def test_every_module_of_the_real_model_is_known_in_every_spelling(name):
    """Also with `_` between the parts, where no list of the modules tells which of them are parts."""
    with torch.device("meta"):
        state = REAL_MODELS[name]().state_dict()
    weights = {key: tensor for key, tensor in state.items() if key.endswith(".weight") and tensor.ndim > 1}
    [family] = known_families("models", name)
    key_map = family.facts.key_map({key: tensor.shape for key, tensor in weights.items()})
    for key in weights:
        module, released = key.removesuffix(".weight"), key_map.released_name(key).removesuffix(".weight")
        for spelling in (
            f"diffusion_model.{released}",
            f"lora_unet_{released.replace('.', '_')}",
            f"{family.facts.folder}.{module}",
            f"base_model.model.{module}",
            f"lycoris_{module.replace('.', '_')}",
        ):
            place = place_of(spelling, key_map)
            assert place is not None, spelling
            assert module in place.modules, spelling
            assert len(place.modules) == 1 or place.layout == "released"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """The same model as a diffusers folder and as the release's one file."""
    root = tmp_path_factory.mktemp("sdxl")
    for layout in ("diffusers", "released"):
        load_family("sdxl").write_tiny("sdxl", root / layout, layout, seed=0)
    return root / "diffusers", next((root / "released").glob("*.safetensors"))


def test_a_checkpoint_of_all_networks_becomes_folders(sdxl, tmp_path, capsys):
    expected, checkpoint = sdxl
    marked = tmp_path / "marked.safetensors"
    save_file({**load_file(checkpoint), "v_pred": torch.zeros(0)}, marked)
    shutil.copy(checkpoint.with_suffix(".json"), marked.with_suffix(".json"))  # a tiny model's heads have another width
    folder = convert(marked, "--to", "diffusers", "--out", tmp_path / "folders")
    assert "v_pred told ComfyUI of the kind of model; in diffusers the configs do" in capsys.readouterr().out
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = load_file(next((folder / part).glob("*.safetensors")))
        reference = load_file(next((expected / part).glob("*.safetensors")))
        reference = {key: tensor for key, tensor in reference.items() if not key.endswith("position_ids")}
        assert weights.keys() == reference.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in reference.items()), part
        assert (folder / part / "config.json").is_file()
    CLIPTextModel.from_pretrained(folder / "text_encoder")
    AutoencoderKL.from_pretrained(folder / "vae")

    again = load_file(convert(marked, "--to", "comfy", "--out", tmp_path / "again.safetensors"))
    first = load_file(marked)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    capsys.readouterr()
    assert main([str(marked)]) == 0
    told = capsys.readouterr().out
    for title in ("SDXL UNet", "SDXL VAE", "CLIP-L text encoder", "CLIP-G text encoder", "marks for ComfyUI: v_pred"):
        assert title in told
    assert "released names after `model.diffusion_model.`" in told
    assert "left over" not in told

    save_file({**first, "optimizer.step": torch.ones(1)}, marked)
    assert main([str(marked), "--to", "comfy"]) == 2
    assert "not all of it is understood, so it was not converted:\n  - optimizer.step" in capsys.readouterr().err


def test_a_lora_with_text_encoders(sdxl, tmp_path, capsys):
    folder, _ = sdxl
    sizes = {"lora_unet_middle_block_1_proj_in": None}
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        width = json.loads((folder / part / "config.json").read_text())["hidden_size"]
        sizes[f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"] = width
    unet = load_file(next((folder / "unet").glob("*.safetensors")))
    sizes["lora_unet_middle_block_1_proj_in"] = unet["mid_block.attentions.0.proj_in.weight"].shape[1]
    tensors = {}
    for module, width in sizes.items():
        tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = torch.randn(2, width), torch.randn(width, 2)
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    file = convert(tmp_path / "kohya.safetensors", "--to", "diffusers", "--out", tmp_path / "diffusers.safetensors")
    assert {key.partition(".")[0] for key in load_file(file)} == {"unet", "text_encoder", "text_encoder_2"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(file, adapter_name="x")
    for name, network in (("te1", pipeline.text_encoder), ("te2", pipeline.text_encoder_2), ("unet", pipeline.unet)):
        loaded = {key: tensor for key, tensor in network.state_dict().items() if "lora_" in key}
        assert len(loaded) == 2, name
        found = next(tensor for key, tensor in loaded.items() if "lora_B" in key)
        given = next(
            tensor for key, tensor in tensors.items() if key.startswith(f"lora_{name}_") and key.endswith("lora_up.weight")
        )
        assert torch.equal(found, given / 2), "alpha 1 of rank 2"
    again = load_file(convert(file, "--to", "comfy", "--out", tmp_path / "again.safetensors"))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert main([str(file), "--to", "peft"]) == 2
    assert "a file of PEFT is for one network" in capsys.readouterr().err


def test_edit_2511_is_told_in_both_layouts(tmp_path):
    """ComfyUI knows it by a tensor, diffusers by its config."""
    load_family("qwen_image").write_tiny("qwen-image-edit-2511", tmp_path / "model", "diffusers", seed=0)
    file = convert(tmp_path / "model/transformer", "--to", "comfy", "--out", tmp_path / "comfy.safetensors")
    assert load_file(file)["__index_timestep_zero__"].numel() == 0
    config = json.loads((tmp_path / "model/transformer/config.json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**config, "zero_cond_t": False}))  # of the tiny model's sizes
    folder = convert(file, "--to", "diffusers", "--out", tmp_path / "again")
    assert json.loads((folder / "config.json").read_text())["zero_cond_t"] is True
