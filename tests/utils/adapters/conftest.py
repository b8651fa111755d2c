"""A small Wan transformer, and the adapter of each kind as PEFT itself makes it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor

from models.wan.keys import wan_key_map
from utils.adapters.manager import trainable_parameters
from utils.formats.adapter_format import LoraFormat
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter
from utils.weights.named import WeightSource, save_safetensors

TARGETS = r"blocks\.\d+\.(attn1\.to_q|ffn\.net\.2)"
RANK, ALPHA = 3, 5
PEFT: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS),
    "rslora": lambda: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=True),
    "loha": lambda: LoHaConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS),
    "lokr": lambda: LoKrConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS),
}
"""By ``[adapter] type``."""


def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
    return WanTransformer3DModel(**shape).eval()


def output(transformer: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 8, 16, generator=generator)
    with torch.no_grad():
        return transformer(x, torch.tensor([400.0]), text, return_dict=False)[0]


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> WeightSource:
    """The weights of ``model()``."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_safetensors(path, model().state_dict())
    return WeightSource(path, wan_key_map())


@pytest.fixture(scope="session")
def trained(source, tmp_path_factory) -> dict[str, tuple[Path, Tensor]]:
    """By kind: the file of an adapter of rank 3 and alpha 5, and the output of the model that PEFT makes with it."""
    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for kind, config in PEFT.items():
        transformer = model()
        inject_adapter_in_model(config(), transformer)
        weights = {name: parameter.detach() for name, parameter in trainable_parameters(transformer).items()}
        torch.manual_seed(2)
        for value in weights.values():
            value.add_(0.1 * torch.randn(value.shape))
        path = export_adapter(
            folder,
            kind,
            weights,
            expected={name: value.shape for name, value in weights.items()},
            scales=dict.fromkeys(modules_of(weights), ALPHA / (RANK**0.5 if kind == "rslora" else RANK)),
            key_map=wan_key_map(),
            fmt=LoraFormat(prefix="diffusion_model.", names="released"),
            dtype=torch.float32,
            family={"modelspec.architecture": "test"},
            facts=TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1.0, seed=0),
            base=source.read,
        )
        made[kind] = path, output(transformer)
    return made
