"""Which modules get an adapter, and of which size."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from pydantic import ValidationError
from torch import nn

from tests.utils.adapters.conftest import model
from utils.adapters.manager import AdapterManager
from utils.adapters.targets import size_of
from utils.config.schema import AdapterConfig
from utils.errors import UserError


def names_of(transformer: nn.Module, default: str = "", **settings) -> list[str]:
    return AdapterManager(AdapterConfig(**{"rank": 1, **settings}), default).target_names(transformer)


def flux() -> nn.Module:
    shape = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8}
    with torch.device("meta"):
        return FluxTransformer2DModel(in_channels=4, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4], **shape)


def test_targets_by_ending_and_by_pattern():
    transformer = model()
    by_ending = names_of(transformer, target_modules=["to_q"])
    by_pattern = names_of(transformer, target_modules=r".*\.to_q")
    assert by_ending == by_pattern == [f"blocks.{block}.attn{n}.to_q" for block in (0, 1) for n in (1, 2)]
    excluded = names_of(transformer, target_modules=["to_q"], exclude_modules=r".*attn2.*")
    assert excluded == ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]
    with pytest.raises(UserError, match="is not a regular expression"):
        names_of(transformer, target_modules="(")
    with pytest.raises(UserError, match="matches no module of the model; its linear modules are named like blocks"):
        names_of(transformer, target_modules=["to_qq"])
    with pytest.raises(UserError, match=r"matches 'blocks.0.attn1.norm_q', a RMSNorm and 3 more; a lora goes on Linear, Conv1d"):
        names_of(transformer, target_modules=["norm_q"])
    with pytest.raises(UserError, match="a Conv3d; a loha goes on Linear, Conv1d, Conv2d only"):
        names_of(transformer, type="loha", target_modules=["patch_embedding"])
    assert names_of(transformer, target_modules=["patch_embedding"]) == ["patch_embedding"]


def test_layers_choose_blocks_by_their_numbers():
    transformer = flux()
    assert names_of(model(), target_modules=["to_q"], layers="1") == ["blocks.1.attn1.to_q", "blocks.1.attn2.to_q"]
    of_both = {"transformer_blocks": "0-1", "single_transformer_blocks": "0,2"}
    double = [f"transformer_blocks.{block}.attn.to_q" for block in (0, 1)]
    single = [f"single_transformer_blocks.{block}.attn.to_q" for block in (0, 2)]
    assert names_of(transformer, target_modules=["to_q"], layers=of_both) == double + single
    assert names_of(transformer, target_modules=["to_q"], layers={"single_transformer_blocks": "0,2"}) == single
    # A module outside of all blocks is in none of them.
    assert names_of(transformer, target_modules=["to_q", "x_embedder"], layers=of_both) == double + single
    assert names_of(transformer, target_modules=["proj_mlp"], layers="1") == ["single_transformer_blocks.1.proj_mlp"]


def test_layers_that_the_model_does_not_have_are_refused_with_those_that_it_has():
    transformer = flux()
    with pytest.raises(UserError) as raised:
        names_of(transformer, target_modules=["to_q"], layers="0-1")
    assert "transformer_blocks (0-1), single_transformer_blocks (0-2)" in str(raised.value)
    assert '{transformer_blocks = "0-1", single_transformer_blocks = "0-1"}' in str(raised.value)
    with pytest.raises(UserError, match=r"names block 2 of blocks, which has only 0 to 1"):
        names_of(model(), target_modules=["to_q"], layers="0-3")
    with pytest.raises(UserError, match=r"names blocks; the blocks that the adapter goes on are transformer_blocks \(0-1\)"):
        names_of(transformer, target_modules=["to_q"], layers={"blocks": "0"})
    for wrong in ("3-1", "a", "", "1;2"):
        with pytest.raises(ValidationError, match="names no blocks"):
            AdapterConfig(rank=1, layers=wrong)


def test_overrides_are_rank_and_alpha_patterns_of_peft():
    """As PEFT reads the same from its own config."""
    override = [{"modules": ["to_q"], "rank": 4}, {"modules": r"blocks\.1\.ffn\.net\.2", "rank": 2, "alpha": 8.0}]
    config = AdapterConfig(type="rslora", rank=3, alpha=5.0, target_modules=["to_q", "to_k", "net.2"], override=override)
    ours, theirs = model(), model()
    manager = AdapterManager(config, "")
    manager.attach(ours)
    plain = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["to_q", "to_k", "net.2"],
        rank_pattern={"to_q": 4, r"blocks\.1\.ffn\.net\.2": 2},
        alpha_pattern={r"blocks\.1\.ffn\.net\.2": 8.0},
    )
    inject_adapter_in_model(plain, theirs)
    expected = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    found = {name: module for name, module in ours.named_modules() if hasattr(module, "lora_A")}
    assert found.keys() == expected.keys()
    for name, module in found.items():
        assert module.scaling == expected[name].scaling == {"default": manager.scale_of(name)}
        assert module.lora_A["default"].weight.shape == expected[name].lora_A["default"].weight.shape


def test_an_override_without_alpha_has_the_scale_of_the_others_or_one():
    override = [{"modules": ["a"], "rank": 4}]
    assert size_of(AdapterConfig(rank=2, override=override), "x.a").alpha == 4
    assert size_of(AdapterConfig(rank=2, alpha=1.0, override=override), "x.a").alpha == 1.0


def test_overrides_that_match_nothing_or_twice_and_ranks_without_use_are_told(caplog):
    override = [{"modules": ["to_x"], "rank": 4}, {"modules": ["to_q"], "rank": 4}, {"modules": r".*attn1\.to_q", "alpha": 1.0}]
    with pytest.raises(UserError) as raised:
        names_of(model(), target_modules=["to_q", "net.2", "proj_out"], override=override)
    text = str(raised.value)
    assert "adapter.override[0].modules = ['to_x'] matches no module that gets an adapter" in text
    assert "adapter.override[1] and adapter.override[2] match blocks.0.attn1.to_q and 1 more" in text
    names_of(model(), rank=25, target_modules=["net.2"])
    assert "adapter.rank = 25 is above what blocks.0.ffn.net.2 can use and 1 more: its weight is [24, 48]" in caplog.text
    with pytest.raises(UserError, match=r"leaves no factor to be decomposed.*a scale of 1.6e-05; leave alpha out"):
        names_of(model(), type="lokr", rank=10**6, alpha=16.0, target_modules=["to_q"])
    assert names_of(model(), type="lokr", rank=10**6, target_modules=["attn1.to_q"], layers="0") == ["blocks.0.attn1.to_q"]


def test_parts_that_are_not_trained_get_no_adapter():
    manager = AdapterManager(AdapterConfig(rank=1, target_modules=["to_q"]), "", lambda name: name.startswith("blocks.0"))
    assert manager.target_names(model()) == ["blocks.1.attn1.to_q", "blocks.1.attn2.to_q"]
    manager = AdapterManager(AdapterConfig(rank=1, target_modules=["to_q"]), "", lambda name: True)
    with pytest.raises(UserError, match="only parts of the model whose learning rate is 0"):
        manager.target_names(model())


def test_settings_of_one_kind_are_refused_with_another():
    with pytest.raises(ValidationError, match="only read with type = \"lokr\", which is 'lora'"):
        AdapterConfig(rank=1, decompose_factor=4)
    with pytest.raises(ValidationError, match='type = "loha" is added to the weight and has no input to drop'):
        AdapterConfig(type="loha", rank=1, dropout=0.1)
    with pytest.raises(ValidationError, match="give a rank or an alpha"):
        AdapterConfig(rank=1, override=[{"modules": ["a"]}])
    assert AdapterConfig(type="dora", rank=1, dropout=0.1).dropout == 0.1
