"""Adapters against PEFT: scale, start from a file, merge into the base."""

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model

from models.wan.keys import wan_key_map
from utils.adapters.manager import AdapterManager, MergedWeights, adaptable_modules, trainable_parameters
from utils.checkpoints.export import LoraFormat, TrainingFacts, export_lora, load_lora
from utils.checkpoints.weights import WeightSource, materialise, save_safetensors
from utils.config.schema import AdapterConfig
from utils.errors import UserError

TARGETS = r"blocks\.\d+\.(attn1\.to_q|ffn\.net\.2)"


def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
    return WanTransformer3DModel(**shape).eval()


def output(transformer: WanTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 8, 16, generator=generator)
    with torch.no_grad():
        return transformer(x, torch.tensor([400.0]), text, return_dict=False)[0]


@pytest.fixture
def trained(tmp_path):
    """A LoRA file of rank 3 and alpha 5, and the output of the model that PEFT makes with it."""
    transformer = model()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False), transformer)
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(transformer).items() if ".lora_" in name}
    path = export_lora(
        tmp_path,
        "trained",
        weights,
        expected={name: value.shape for name, value in weights.items()},
        key_map=wan_key_map(),
        fmt=LoraFormat(prefix="diffusion_model.", names="released"),
        alpha=5,
        rank=3,
        dtype=torch.float32,
        family={"modelspec.architecture": "test"},
        facts=TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1.0, seed=0),
    )
    return path, output(transformer)


def source_of(transformer: WanTransformer3DModel, folder) -> WeightSource:
    save_safetensors(folder / "base.safetensors", transformer.state_dict())
    return WeightSource(folder / "base.safetensors", wan_key_map())


def test_merged_into_the_base_it_computes_the_same(trained, tmp_path):
    path, expected = trained
    base = model()
    source = source_of(base, tmp_path)
    file = load_lora(path, adaptable_modules(source), wan_key_map())
    assert (output(base) - expected).abs().max() > 1e-2

    def merged(*weights: float) -> torch.Tensor:
        with torch.device("meta"):
            transformer = WanTransformer3DModel.from_config(base.config).eval()
        materialise(transformer, source.names(), MergedWeights(source, [(file, weight) for weight in weights]), device="cpu")
        transformer.rope = base.rope
        return output(transformer)

    assert (merged(1.0) - expected).abs().max() <= 1e-5
    assert (merged(0.25, 0.75) - expected).abs().max() <= 1e-5
    assert torch.equal(merged(), output(base))


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_started_from_a_file_it_computes_the_same_at_any_alpha(trained, tmp_path, kind):
    path, expected = trained
    transformer = model()
    file = load_lora(path, adaptable_modules(source_of(transformer, tmp_path)), wan_key_map())
    manager = AdapterManager(AdapterConfig(type=kind, rank=3, alpha=7.0), TARGETS)
    assert manager.scale == pytest.approx(7 / 3 if kind == "lora" else 7 / math.sqrt(3))
    manager.attach(transformer)
    wanted = trainable_parameters(transformer)
    values = manager.values_from(file, wanted.items(), path)
    assert values.keys() == wanted.keys()
    materialise(transformer, values, values, device="cpu")
    assert (output(transformer) - expected).abs().max() <= 1e-5


def test_a_file_of_another_rank_is_refused(trained, tmp_path):
    path, _ = trained
    transformer = model()
    file = load_lora(path, adaptable_modules(source_of(transformer, tmp_path)), wan_key_map())
    manager = AdapterManager(AdapterConfig(rank=4), TARGETS)
    with pytest.raises(UserError, match=r"has rank 3, adapter.rank = 4; set adapter.rank to the file's"):
        manager.values_from(file, [], path)


def test_targets_by_ending_and_by_pattern():
    transformer = model()
    by_ending = AdapterManager(AdapterConfig(rank=1, target_modules=["to_q"]), "").target_names(transformer)
    by_pattern = AdapterManager(AdapterConfig(rank=1, target_modules=r".*\.to_q"), "").target_names(transformer)
    assert by_ending == by_pattern == [f"blocks.{block}.attn{n}.to_q" for block in (0, 1) for n in (1, 2)]
    excluded = AdapterConfig(rank=1, target_modules=["to_q"], exclude_modules=r".*attn2.*")
    assert AdapterManager(excluded, "").target_names(transformer) == ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]
    with pytest.raises(UserError, match="is not a regular expression"):
        AdapterManager(AdapterConfig(rank=1, target_modules="("), "").target_names(transformer)
    with pytest.raises(UserError, match=r"matches 'blocks.0.attn1.norm_q', a RMSNorm"):
        AdapterManager(AdapterConfig(rank=1, target_modules=["norm_q"]), "").target_names(transformer)
