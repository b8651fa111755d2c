"""The layers against the plain model, ``prepare_inputs`` against the pipelines, the options, and the exports."""

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from models import load_family
from tests.models.flux2 import reference
from utils.data.values import Batch
from utils.diffusion.timesteps import resolution_shift
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_files import read_adapter
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter, export_full
from utils.pipeline.layer import Stream
from utils.weights.named import materialise

RANK, ALPHA = 4, 6.0
FACTS = TrainingFacts(step=1, epoch=1, samples=2, learning_rate=1e-4, seed=0)


def family_of(folder, **options):
    Family = load_family("flux2")
    return Family(Family.Options(type="flux2", path=folder, **{"dtype": "float32", **options}))


def loaded(family):
    """The transformer with its weights, and its layers."""
    with torch.device("meta"):
        transformer = family.build_transformer()
    layers = family.layers(transformer)
    source = family.weights()
    assert materialise(transformer, source.names(), source, device="cpu") == []
    return transformer, layers


def run(layers, inputs) -> Stream:
    stream = Stream(inputs)
    for layer in layers:
        stream = layer(stream)
    return stream


# --- layers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1], ids=["text to image", "edit"])
def test_layers_compute_what_the_model_computes(flux2, variant, index):
    family = family_of(flux2(variant))
    transformer, layers = loaded(family)
    plain = reference.plain_model(flux2(variant))
    micro_batch = family.prepare_inputs(reference.batch(family, index), Draw(0, 0))
    assert ("references" in micro_batch.inputs) == bool(reference.REFERENCES[index])
    output = run(layers, micro_batch.inputs)
    expected = reference.predict(plain, micro_batch.inputs)
    assert torch.equal(output["prediction"], expected)
    assert expected.shape == micro_batch.target["velocity"].shape

    family.loss(output, micro_batch.target).backward()
    family.loss(Stream(prediction=expected), micro_batch.target).backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in transformer.named_parameters():
        theirs = gradients[name].grad
        assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_layers_compute_in_bf16_with_time_in_fp32(flux2, variant):
    """The hidden states are bf16.  Two times that bf16 does not tell apart differ, and the model sees that they do."""
    family = family_of(flux2(variant), dtype="bfloat16")
    _, layers = loaded(family)
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    times = [torch.full((2,), 0.7), torch.full((2,), 0.7002)]
    assert torch.equal(times[0].bfloat16(), times[1].bfloat16())
    streams = [layers[0](Stream({**inputs, "t": t})) for t in times]
    assert {tensor.dtype for name, tensor in streams[0].items() if name != "grid"} == {torch.bfloat16}
    assert not torch.equal(streams[0]["time"], streams[1]["time"])
    assert run(layers, inputs)["prediction"].dtype is torch.bfloat16


def test_a_layer_hands_on_only_what_is_used_later(flux2):
    family = family_of(flux2("flux2-dev"))
    _, layers = loaded(family)
    stream = Stream(family.prepare_inputs(reference.batch(family, 1), Draw(0, 0)).inputs)
    held = []
    for layer in layers:
        stream = layer(stream)
        held.append(set(stream))
    doubles, singles = {"hidden", "context", "modulation_img", "modulation_txt"}, {"hidden", "modulation_single"}
    always = {"time", "grid"}
    assert held[0] == held[1] == held[2] == doubles | singles | always
    assert held[3] == held[4] == held[5] == singles | always
    assert held[6] == {"hidden"} | always
    assert held[7] == {"prediction"}


# --- prepare_inputs ------------------------------------------------------------------------------------------------------------


def test_noise_and_time_hang_on_the_sample_alone(flux2):
    family = family_of(flux2("flux2-klein"))
    batch, draw = reference.batch(family, 0), Draw(3, 1)
    together = family.prepare_inputs(batch, draw)
    alone = Batch(keys=batch.keys[1:], fields={name: values[1:] for name, values in batch.fields.items()})
    assert torch.equal(family.prepare_inputs(alone, draw).inputs["x"][0], together.inputs["x"][1])
    noise = draw.normal(batch.keys[1], "noise", (128, 1, 4, 6))
    latents, t = batch.fields["latents"][1], together.inputs["t"][1]
    assert torch.equal(together.target["velocity"][1], noise - latents)
    torch.testing.assert_close(together.inputs["x"][1], (1 - t) * latents + t * noise)
    assert together.inputs["x"].dtype is together.inputs["t"].dtype is torch.float32


def test_the_shift_grows_with_the_picture_unless_it_is_given(flux2):
    def t(side, **options):
        family = family_of(flux2("flux2-dev"), timestep_sample_method="uniform", **options)
        batch = reference.batch(family, 0)
        latents = [torch.zeros(128, 1, side, side)] * 2
        inputs = family.prepare_inputs(replace(batch, fields={**batch.fields, "latents": latents}), Draw(0, 0, fixed_time=0.5))
        return inputs.inputs["t"][0].item()

    for side in (16, 64):
        shift = resolution_shift(side * side)
        assert t(side) == pytest.approx(shift / (1 + shift))
        assert t(side, shift=3.0) == pytest.approx(0.75)
    assert t(16) < t(64)


def test_guidance_is_told_to_dev_alone(flux2, caplog):
    with caplog.at_level(logging.WARNING):
        family = family_of(flux2("flux2-dev"), guidance=2.5)
        assert family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs["guidance"].tolist() == [2.5, 2.5]
        assert not caplog.records
        family = family_of(flux2("flux2-klein"), guidance=2.5)
    assert "guidance" not in family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    assert "model.guidance has no effect" in caplog.text


def test_samples_with_other_numbers_of_references(flux2):
    family = family_of(flux2("flux2-klein"))
    batch = reference.batch(family, 1)
    references = [batch.fields["references"][0], batch.fields["references"][1][:1]]
    with pytest.raises(UserError, match=r"reference/1\.1#0 has 1 and reference/1\.0#0 has 2.*micro_batch_size_per_gpu = 1"):
        family.prepare_inputs(replace(batch, fields={**batch.fields, "references": references}), Draw(0, 0))


# --- exports -------------------------------------------------------------------------------------------------------------------


def pipeline_of(variant, transformer):
    Pipeline = reference.PIPELINES[variant]
    return Pipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)


def with_adapters(model, targets):
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}


def linear_modules(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def exported_lora(folder, family, weights):
    return export_adapter(
        folder,
        "lora",
        weights,
        expected={name: tuple(tensor.shape) for name, tensor in weights.items()},
        key_map=family.key_map(),
        fmt=family.lora_format,
        scales=dict.fromkeys(modules_of(weights), ALPHA / RANK),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
    )


SOME = r"transformer_blocks\.[02]\.attn\.(to_q|to_v|add_k_proj|to_out\.0)|single_transformer_blocks\.1\.attn\.to_out"


@pytest.mark.parametrize("targets", [None, "every linear", SOME], ids=["default", "every linear", "parts of fused ones"])
def test_diffusers_reads_a_lora_whole_and_at_the_trained_strength(flux2, variant, targets, tmp_path, caplog):
    family = family_of(flux2(variant))
    inputs = family.prepare_inputs(reference.batch(family, 1), Draw(0, 0)).inputs
    trained, fresh = (reference.plain_model(flux2(variant)).eval() for _ in range(2))
    before = reference.predict(fresh, inputs)
    # diffusers' loader takes the rows of the final modulation as they are, though its own weight has them in another order.
    linear = [name for name in linear_modules(trained) if name != "norm_out.linear"]
    weights = with_adapters(trained, "|".join(linear) if targets == "every linear" else targets or family.adapter_targets)
    adapted = [name for name, module in trained.named_modules() if isinstance(module, LoraLayer)]
    assert targets != "every linear" or adapted == linear
    path = exported_lora(tmp_path, family, weights)

    pipeline = pipeline_of(variant, fresh)
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(path)
    assert not caplog.records, caplog.text
    with torch.no_grad():
        expected, output = reference.predict(trained, inputs), reference.predict(fresh, inputs)
    assert (expected - before).abs().max() > 0.1
    assert (output - expected).abs().max() <= 1e-5

    read = read_adapter(path, linear, family.key_map())
    assert read.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(read.weights[name], tensor * ALPHA / RANK if "lora_B" in name else tensor)


def test_lora_keys_are_those_that_comfyui_reads(flux2, tmp_path):
    """ComfyUI's names are the release's weights with ``diffusion_model.`` before them; those of diffusers it drops in silence."""
    family = family_of(flux2("flux2-dev"))
    weights = with_adapters(reference.plain_model(flux2("flux2-dev")), family.adapter_targets)
    tensors = load_file(exported_lora(tmp_path, family, weights))
    released = load_file(flux2("flux2-dev", "comfy") / "diffusion_models/flux2-dev.safetensors")
    modules = {key.removeprefix("diffusion_model.").rpartition(".lora_")[0] for key in tensors}
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    assert {f"{module}.weight" for module in modules} <= released.keys()
    fused = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert tensors[f"{fused}.lora_A.weight"].shape == (3 * RANK, 32)
    assert tensors[f"{fused}.lora_B.weight"].shape == (96, 3 * RANK)


def test_a_lora_in_the_released_naming_is_the_same_change_of_the_released_weights(flux2, variant, tmp_path):
    """What ComfyUI computes, W + B A on its own weights, is what training computes: on every linear module."""
    family = family_of(flux2(variant))
    model = reference.plain_model(flux2(variant))
    weights = with_adapters(model, "|".join(linear_modules(model)))
    tensors = load_file(exported_lora(tmp_path, family, weights))
    [file] = flux2(variant, "released").glob("flux*.safetensors")
    merged = load_file(file)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        merged[key.removeprefix("diffusion_model.").replace("lora_A.", "")] += (
            tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        )
    for name, tensor in family.key_map().to_diffusers(merged).items():
        module = name.removesuffix(".weight")
        expected = family.weights().read(name)
        if f"{module}.lora_A.weight" in weights:
            expected = expected + ALPHA / RANK * weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]
        torch.testing.assert_close(tensor, expected)


def test_a_full_export_is_the_released_file(flux2, variant, tmp_path):
    """Read by diffusers, it gives the same output; and it has the keys that the release has."""
    family = family_of(flux2(variant))
    source = family.weights()
    weights = {name: source.read(name) for name in source.names()}
    path = export_full(
        tmp_path,
        "full",
        weights,
        expected={name: tuple(tensor.shape) for name, tensor in weights.items()},
        key_map=family.key_map(),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
    )
    [released] = flux2(variant, "released").glob("flux*.safetensors")
    expected = load_file(released)
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in load_file(path).items())
    assert not expected
    model = Flux2Transformer2DModel.from_single_file(path, config=str(flux2(variant) / "transformer"), torch_dtype=torch.float32)
    inputs = family.prepare_inputs(reference.batch(family, 1), Draw(0, 0)).inputs
    with torch.no_grad():
        difference = reference.predict(model, inputs) - reference.predict(reference.plain_model(flux2(variant)), inputs)
    assert difference.abs().max() <= 1e-5


def test_metadata_names_the_base_model(flux2):
    assert family_of(flux2("flux2-dev")).export_metadata()["modelspec.architecture"] == "flux-2-dev"
    klein = family_of(flux2("flux2-klein"))
    assert klein.export_metadata()["modelspec.architecture"] == "flux-2-klein"
    for heads, name in ((24, "flux-2-klein-4b"), (32, "flux-2-klein-9b")):
        klein.config = {**klein.config, "num_attention_heads": heads}
        assert klein.export_metadata()["modelspec.architecture"] == name
