"""Learning rates by part: what each weight gets, what is frozen, what is refused."""

import pytest
from torch import nn

from utils.config.schema import OptimizerConfig
from utils.errors import UserError
from utils.optim.rates import LearningRates

PARTS = {"attention": r"blocks\.\d+\.attn", "tables": r"table|blocks\.\d+\.table", "rest": r"blocks\.\d+\.ff|out"}


def rates(lr=1e-3, of_model=(), **part_lr):
    return LearningRates.of(OptimizerConfig(type="adamw", lr=lr, part_lr=part_lr), PARTS, dict(of_model))


def test_a_path_stands_for_everything_below_it_and_for_nothing_else():
    found = {
        name: rates().part_of(name) for name in ("blocks.3.attn", "blocks.3.attn.to_q.lora_A.weight", "blocks.12.table", "out.bias")
    }
    assert list(found.values()) == ["attention", "attention", "tables", "rest"]
    assert rates().part_of("blocks.3.attn2.to_q.weight") is None
    assert rates().part_of("outer.weight") is None


def test_rates_of_parts_of_the_model_table_and_of_the_rest():
    chosen = rates(of_model={"attention": 5e-4, "tables": 0.0}, attention=2e-4)
    assert [chosen.rate(name) for name in ("blocks.0.attn.q", "table", "out.weight", "other")] == [2e-4, 0.0, 1e-3, 1e-3]
    assert [chosen.freezes(name) for name in ("blocks.0.attn.q", "table", "out.weight")] == [False, True, False]
    assert chosen.scaled(0.5) == {"lr": 5e-4, "lr_attention": 1e-4}


def test_a_default_of_zero_freezes_the_rest_only_where_a_part_has_a_rate():
    assert not rates(lr=0.0).freezes("out.weight")
    assert rates(lr=0.0, attention=1e-4).freezes("out.weight")
    assert not rates(lr=0.0, attention=1e-4).freezes("blocks.0.attn.q")


def test_frozen_parts_are_not_trained_and_the_report_says_so():
    model = nn.ModuleDict({"out": nn.Linear(2, 2), "table": nn.Linear(2, 2)})
    chosen = rates(tables=0.0, attention=1e-4)
    chosen.freeze(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["out.weight", "out.bias"]
    assert chosen.report(trained) == [
        "learning rate of tables: 0, it is frozen",
        "learning rate of attention: 0.0001 (no effect, no weight of this part is trained)",
        "learning rate of the rest: 0.001 (2 weights)",
    ]
    assert rates().report(trained) == []
    with pytest.raises(UserError, match="nothing is trained"):
        rates(rest=0.0).report([])


def test_an_unknown_part_is_refused_with_what_there_is():
    with pytest.raises(
        UserError, match=r"(?s)can have attention, tables, rest.*part_lr.atention .* did you mean `attention`"
    ) as error:
        rates(atention=1e-4, nothing=0.0)
    assert "optimizer.part_lr.nothing" in str(error.value)
