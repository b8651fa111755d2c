"""Adapters of every kind against PEFT: start values, strength, start from a file, merge into the base."""

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from models.wan.keys import wan_key_map
from tests.utils.adapters.conftest import PEFT, RANK, TARGETS, model, output
from utils.adapters.manager import AdapterManager, MergedWeights, adaptable_modules, trainable_parameters
from utils.config.schema import AdapterConfig
from utils.errors import UserError
from utils.formats.adapter_files import AdapterFile, read_adapter
from utils.weights.named import canonical_name, materialise
from utils.weights.tensor_files import TensorInfo


def read(path, source) -> AdapterFile:
    return read_adapter(path, adaptable_modules(source), wan_key_map(), base=source.read)


@pytest.mark.parametrize("kind", PEFT)
def test_merged_into_the_base_it_computes_the_same(kind, trained, source):
    path, expected = trained[kind]
    base = model()
    file = read(path, source)
    assert (output(base) - expected).abs().max() > 1e-2

    def merged(*strengths: float) -> torch.Tensor:
        with torch.device("meta"):
            transformer = WanTransformer3DModel.from_config(base.config).eval()
        weights = MergedWeights(source)
        for strength in strengths:
            weights = weights.with_adapter(file, strength)
        materialise(transformer, source.names(), weights, device="cpu")
        transformer.rope = base.rope
        return output(transformer)

    assert (merged(1.0) - expected).abs().max() <= 1e-5
    assert torch.equal(merged(), output(base))
    assert torch.equal(merged(0.0), output(base))
    if kind != "dora":  # the second would have rows of another length before it
        assert (merged(0.25, 0.75) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", PEFT)
def test_started_from_a_file_it_computes_the_same_at_any_alpha(kind, trained, source):
    path, expected = trained[kind]
    transformer = model()
    manager = AdapterManager(AdapterConfig(type=kind, rank=RANK, alpha=7.0), TARGETS)
    assert manager.scale_of("blocks.0.attn1.to_q") == pytest.approx(7 / math.sqrt(3) if kind == "rslora" else 7 / 3)
    manager.attach(transformer)
    wanted = trainable_parameters(transformer)
    values = manager.values_from(read(path, source), wanted.items(), path)
    assert values.keys() == wanted.keys()
    materialise(transformer, values, values, device="cpu")
    assert (output(transformer) - expected).abs().max() <= 1e-5


def test_a_file_of_another_kind_or_rank_is_refused(trained, source):
    wanted = {}
    for kind, rank, factor, message in (
        ("lora", 4, None, r"has rank 3 for .*, adapter\.rank = 4; set adapter\.rank to the file's"),
        ("loha", 4, None, r"hada_w1_a should be of \[24, 4\] and is of \[24, 3\]; set adapter\.rank to the file's"),
        ("lokr", 3, 2, r"lokr_w1 should be of .*; set adapter\.rank and adapter\.decompose_factor to the file's"),
        ("dora", 3, None, r"dora, adapter\.type = .lora.; set adapter\.type to the file\'s kind"),
    ):
        path, _ = trained[kind]
        file = read(path, source)
        asked = "lora" if kind == "dora" else kind
        manager = AdapterManager(AdapterConfig(type=asked, rank=rank, decompose_factor=factor), TARGETS)
        transformer = model()
        manager.attach(transformer)
        wanted = trainable_parameters(transformer)
        with pytest.raises(UserError, match=message):
            manager.values_from(file, wanted.items(), path)


def test_a_file_with_a_part_that_is_not_trained_is_refused(trained, source):
    """A LoHa with a kernel of its own, as other trainers have it for convolutions."""
    path, _ = trained["loha"]
    file = read(path, source)
    file.weights["blocks.0.attn1.to_q.hada_t1"] = torch.zeros(3, 3, 1, 1)
    transformer = model()
    manager = AdapterManager(AdapterConfig(type="loha", rank=3), TARGETS)
    manager.attach(transformer)
    with pytest.raises(
        UserError, match=r"has blocks\.0\.attn1\.to_q\.hada_t1, a part that an adapter of type 'loha' does not have"
    ):
        manager.values_from(file, trainable_parameters(transformer).items(), path)


class Small(nn.Module):
    """A linear layer and a convolution, large enough for the spread of random values to be seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(96, 60)
        self.conv = nn.Conv2d(24, 40, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 96, H, W] to [B, 40, H, W]."""
        hidden = self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return self.conv(hidden[:, :24])


class Held:
    """The weights of a module by name."""

    def __init__(self, module: nn.Module):
        self.state = module.state_dict()

    def names(self):
        return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in self.state.items()}

    def read(self, name):
        return self.state[name]


ON_SMALL = {
    "lora": lambda: LoraConfig(r=16, target_modules=["linear", "conv"]),
    "rslora": lambda: LoraConfig(r=16, target_modules=["linear", "conv"], use_rslora=True),
    "dora": lambda: LoraConfig(r=16, target_modules=["linear", "conv"], use_dora=True),
    "loha": lambda: LoHaConfig(r=16, target_modules=["linear", "conv"]),
    "lokr": lambda: LoKrConfig(r=2, target_modules=["linear", "conv"]),
}


@pytest.mark.parametrize("kind", ON_SMALL)
def test_first_values_have_the_distribution_of_peft_and_are_known_by_seed_and_name(kind):
    theirs = Small()
    torch.manual_seed(1)
    inject_adapter_in_model(ON_SMALL[kind](), theirs)
    expected = {canonical_name(name): value for name, value in theirs.named_parameters() if value.requires_grad}
    plain = Small()
    manager = AdapterManager(AdapterConfig(type=kind, rank=2 if kind == "lokr" else 16), ".*")
    manager.config = manager.config.model_copy(update={"target_modules": ["linear", "conv"]})
    with torch.device("meta"):
        on_meta = Small()
        manager.attach(on_meta)
    wanted = trainable_parameters(on_meta)
    values = manager.first_values(wanted.items(), 3, Held(plain))
    assert {name: value.shape for name, value in values.items()} == {name: value.shape for name, value in expected.items()}
    for name, value in values.items():
        if "magnitude" in name:
            assert torch.allclose(value, expected[name], rtol=1e-6)
        elif not expected[name].any():
            assert not value.any(), name
        else:
            assert float(value.std()) == pytest.approx(float(expected[name].std()), rel=0.25), name
            bound = 1 / math.sqrt(math.prod(value.shape[1:]))
            assert 0.9 * bound < float(value.abs().max()) <= bound
    some = dict(list(wanted.items())[1:2])
    assert all(torch.equal(value, values[name]) for name, value in manager.first_values(some.items(), 3, Held(plain)).items())
    other = manager.first_values(wanted.items(), 4, Held(plain))
    assert any(not torch.equal(other[name], values[name]) for name in values)

    # It begins as nothing.
    x = torch.randn(2, 96, 5, 7)
    materialise(on_meta, values, values, device="cpu")
    materialise(on_meta, Held(plain).names(), Held(plain), device="cpu")
    assert torch.equal(on_meta(x), plain(x))


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_a_dora_in_bf16_begins_as_nothing_and_measures_rows_in_fp32(adapter_dtype):
    plain = Small().to(torch.bfloat16)
    manager = AdapterManager(AdapterConfig(type="dora", rank=4, dtype=adapter_dtype, target_modules=["linear", "conv"]), "")
    adapted = Small().to(torch.bfloat16)
    manager.attach(adapted)
    wanted = trainable_parameters(adapted)
    values = manager.first_values(wanted.items(), 0, Held(plain))
    for name, parameter in wanted.items():
        assert parameter.dtype == (torch.float32 if "magnitude" in name else getattr(torch, adapter_dtype))
    materialise(adapted, values, values, device="cpu")
    x = torch.randn(2, 96, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted(x), plain(x))

    torch.manual_seed(5)
    for name, parameter in wanted.items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    layer = adapted.linear
    with torch.autocast("cpu", torch.bfloat16):
        dora = layer.lora_magnitude_vector["default"]
        change = dora.get_lora_weight(layer.lora_A["default"], layer.lora_B["default"])
        norms = dora.get_weight_norm(layer.base_layer.weight, change, layer.scaling["default"])
    down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = (layer.base_layer.weight.double() + layer.scaling["default"] * up @ down).norm(dim=1)
    assert norms.dtype == torch.float32
    assert torch.allclose(norms.double(), exact, rtol=1e-6)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kinds_without_dropout_compute_the_same_whatever_the_random_state(kind):
    """PEFT draws a number for each forward in training, and leaves the adapter out where it is exactly 0."""
    transformer = Small().train()
    AdapterManager(AdapterConfig(type=kind, rank=2, target_modules=["linear"]), "").attach(transformer)
    torch.manual_seed(1)
    values = {name: torch.randn(like.shape) for name, like in trainable_parameters(transformer).items()}
    materialise(transformer, values, values, device="cpu")
    x = torch.randn(1, 96, 2, 2)
    usual = transformer(x)
    draw, torch.rand = torch.rand, lambda *size, **options: torch.zeros(*size, **options)
    try:
        at_zero = transformer(x)
    finally:
        torch.rand = draw
    assert torch.equal(usual, at_zero)
