"""Exports of every variant in the programs that read them: nothing left over, the same output."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from models import load_family
from tests.models.wan import reference
from utils.draw import Draw, generator
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter, export_full

RANK, ALPHA = 4, 6.0
FACTS = TrainingFacts(step=3, epoch=1, samples=6, learning_rate=1e-4, seed=0)
LEFT_BY_DIFFUSERS = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
"""What diffusers' conversion of a single file forgets."""
EXPERTS = {"high": "transformer", "low": "transformer_2"}
CASES = [(variant, expert) for variant in reference.PIPELINES for expert in (EXPERTS if variant.startswith("wan22") else (None,))]


@pytest.fixture(params=CASES, ids=[f"{variant} {expert or ''}".strip() for variant, expert in CASES])
def case(request, tmp_path):
    """(family, the pipeline with its model, name of the transformer in it)"""
    variant, expert = request.param
    Family = load_family("wan")
    Family.write_tiny(variant, tmp_path / "model", "diffusers", seed=0)
    family = Family(Family.Options(type="wan", path=tmp_path / "model", dtype="float32", expert=expert))
    pipeline = reference.PIPELINES[variant].from_pretrained(tmp_path / "model")
    return family, pipeline, EXPERTS.get(expert, "transformer")


@torch.no_grad()
def prediction(family, model) -> torch.Tensor:
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    return reference.predict(model.eval(), inputs)


def written(folder, family, export, weights, **more):
    common = {"expected": {name: tuple(tensor.shape) for name, tensor in weights.items()}, "key_map": family.key_map()}
    return export(folder, "run", weights, dtype=torch.float32, family=family.export_metadata(), facts=FACTS, **common, **more)


def test_lora(case, tmp_path):
    family, pipeline, name = case
    model = getattr(pipeline, name)
    before = prediction(family, model)
    trained = getattr(type(pipeline).from_pretrained(tmp_path / "model"), name)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=family.adapter_targets), trained)
    weights = {key.replace(".default", ""): p for key, p in trained.named_parameters() if "lora_" in key}
    for key, parameter in weights.items():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator("lora", key))
    expected = prediction(family, trained)
    assert (expected - before).abs().max() > 1e-3

    scales = dict.fromkeys(modules_of(weights), ALPHA / RANK)
    path = written(tmp_path, family, export_adapter, weights, fmt=family.lora_format, scales=scales)
    pipeline.load_lora_weights(path, adapter_name="run", load_into_transformer_2=name == "transformer_2")
    loaded = {key for key, _ in model.named_parameters() if ".lora_" in key}
    assert len(loaded) == len(weights) == len(load_file(path))
    assert (prediction(family, model) - expected).abs().max() <= 1e-5


def test_full(case, tmp_path):
    family, pipeline, name = case
    model = getattr(pipeline, name)
    weights = {key: tensor + 0.01 for key, tensor in model.state_dict().items()}
    path = written(tmp_path, family, export_full, weights)
    converted = convert_wan_transformer_to_diffusers(load_file(path))
    model.load_state_dict({LEFT_BY_DIFFUSERS.get(key, key): tensor for key, tensor in converted.items()}, strict=True)
    read_again = prediction(family, model)
    model.load_state_dict(weights)
    assert torch.equal(read_again, prediction(family, model))


def test_metadata_tells_the_model(case, tmp_path):
    family, pipeline, name = case
    path = written(tmp_path, family, export_full, getattr(pipeline, name).state_dict())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    release = "wan2.2" if family.variant in ("wan22-t2v", "wan22-i2v", "wan-ti2v") else "wan2.1"
    kind = family.variant.partition("-")[2]
    noise = f"-{family.expert}-noise" if family.expert else ""
    assert metadata["modelspec.architecture"] == f"{release}-{kind}-14b{noise}"
    ranges = {("t2v", "high"): "875,1000", ("t2v", "low"): "0,875", ("i2v", "high"): "900,1000", ("i2v", "low"): "0,900"}
    assert metadata.get("modelspec.timestep_range") == ranges.get((kind, family.expert))
