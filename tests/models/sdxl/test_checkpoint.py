"""What is exported: one checkpoint file that diffusers reads as the whole model, and LoRAs on convolutions too."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from models.sdxl import Family
from models.sdxl.tiny import CHECKPOINT, write_tiny
from tests.distributed.engine_worker import perturbed
from tests.models.sdxl import reference
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.config.schema import AdapterConfig
from utils.draw import Draw
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter, export_full
from utils.pipeline.stage_weights import fill_stage

FACTS = TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-3, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    for layout in ("diffusers", "released"):
        write_tiny("sdxl", root / layout, layout, seed=0)
    return root


def family_of(path, **options) -> Family:
    return Family(Family.Options(type="sdxl", path=path, dtype="float32", **options))


def exported(family: Family, folder, weights: dict[str, torch.Tensor]):
    return export_full(
        folder,
        "trained",
        weights,
        expected={name: tuple(value.shape) for name, value in weights.items()},
        key_map=family.full_key_map(),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
        companions=family.companions(),
    )


def test_the_exported_checkpoint_is_the_release_with_other_unet_weights(model, tmp_path):
    family = family_of(model / "diffusers")
    weights = {name: value + 0.01 for name, value in reference.plain_model(model / "diffusers").state_dict().items()}
    file = exported(family, tmp_path, weights)
    found, released = load_file(file), load_file(model / "released" / f"{CHECKPOINT}.safetensors")
    assert found.keys() == released.keys()
    for name, value in released.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value) is not name.startswith("model.diffusion_model."), name


def test_diffusers_reads_the_exported_checkpoint(model, tmp_path):
    family, unet = family_of(model / "released"), reference.plain_model(model / "diffusers").eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.05)
    file = exported(family, tmp_path, dict(unet.state_dict()))
    pipeline = StableDiffusionXLPipeline.from_single_file(file, config=str(model / "diffusers"), local_files_only=True)
    plain = StableDiffusionXLPipeline.from_pretrained(model / "diffusers")
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    with torch.no_grad():
        assert torch.equal(reference.predict(pipeline.unet.eval(), inputs), reference.predict(unet, inputs))
        texts = [part.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)[::2] for part in (pipeline, plain)]
        for theirs, ours in zip(*texts, strict=True):
            assert torch.allclose(theirs, ours, atol=1e-5)
        latents = torch.randn(1, 4, 4, 4)
        assert torch.allclose(pipeline.vae.decode(latents).sample, plain.vae.decode(latents).sample, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "markers"),
    [
        ({}, set()),
        ({"prediction": "v_prediction"}, {"v_pred", "ztsnr"}),
        ({"prediction": "v_prediction", "zero_terminal_snr": False}, {"v_pred"}),
    ],
)
def test_velocity_prediction_is_marked_and_found_again(model, tmp_path, options, markers):
    family = family_of(model / "released", **options)
    file = exported(family, tmp_path, dict(reference.plain_model(model / "diffusers").state_dict()))
    assert {name for name in load_file(file) if "." not in name} == markers
    (tmp_path / "trained.json").write_text((model / "released" / f"{CHECKPOINT}.json").read_text())
    again = family_of(file, tokenizer_path=model / "released/tokenizer")
    assert (again.prediction, again.zero_terminal_snr) == (family.prediction, family.zero_terminal_snr)
    assert again.export_metadata()["modelspec.prediction_type"] == ("v" if markers else "epsilon")


def test_a_lora_on_everything_loads_whole_in_diffusers(model, tmp_path):
    """Convolutions, samplers and the embeddings of time and size too."""
    family = family_of(model / "diffusers")
    with torch.device("meta"):
        unet = family.build_transformer()
        every = [name for name, part in unet.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))]
        adapter = AdapterManager(AdapterConfig(rank=2, alpha=3.0, target_modules=every), family.adapter_targets)
        adapter.attach(unet)
    values = perturbed(adapter.first_values(trainable_parameters(unet).items(), 0))
    fill_stage(unet, family.layers(unet), family.weights(), values, torch.device("cpu"))
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    file = export_adapter(
        tmp_path,
        "trained",
        values,
        expected={name: value.shape for name, value in values.items()},
        key_map=family.key_map(),
        fmt=family.lora_format,
        scales=dict.fromkeys(modules_of(values), 3.0 / 2),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
    )
    keys = load_file(file)
    assert len(keys) == 3 * len(every)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert float(keys["lora_unet_middle_block_1_proj_in.alpha"]) == 2
    pipeline = StableDiffusionXLPipeline.from_pretrained(model / "diffusers")
    with torch.no_grad():
        expected = reference.predict(unet.eval(), inputs)
        plain = reference.predict(pipeline.unet.eval(), inputs)
        pipeline.load_lora_weights(file, adapter_name="trained")
        loaded = {name for name, part in pipeline.unet.named_modules() if hasattr(part, "lora_A")}
        assert loaded == set(every)
        found = reference.predict(pipeline.unet, inputs)
    assert (found - plain).abs().max() > 1e-2
    assert (found - expected).abs().max() <= 1e-5
