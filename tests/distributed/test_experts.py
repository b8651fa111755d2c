"""Both transformers of Wan 2.2 A14B in one training, one of them alone, and options of Wan that change what is computed."""

from collections.abc import Mapping

import pytest
import torch

from models.wan.experts import PREFIXES
from tests.distributed.cases import Case, Cases, Result
from tests.distributed.engine_worker import open_case, perturbed, prepared
from tests.distributed.test_engine import ADAMW, CLIP, LORA, assert_as_plain, assert_same_bits, plain
from tests.models.wan import reference
from utils.adapters.manager import trainable_parameters
from utils.checkpoints.checkpoint import Checkpoint

HIGH, LOW = PREFIXES.values()
# Far shifted, both experts get about as many micro-batches.  These are the experts of the first twelve, four a step: in the first
# step two replicas run different ones, and in the last one the expert for high noise gets none.
SHIFTED = {"shift": 8.0}
ROUTES = [["high", "low", "high", "low"], ["high", "low", "low", "high"], ["low"] * 4]
ADAPTERS = {"lora": LORA, "full": None}
ALONE = {
    "ti2v-first-frame": ("wan-ti2v", {"first_frame": True}, "transformer"),
    "high-alone": ("wan22-i2v", {"expert": "high"}, "transformer"),
    "low-alone": ("wan22-i2v", {"expert": "low"}, "transformer_2"),
}
"""Variant, options, and what diffusers' pipeline calls the model that is trained."""


def cases() -> dict[str, Case]:
    made = {}
    trained = {"gradient_clipping": CLIP, "optimizer": ADAMW}
    for kind, adapter in ADAPTERS.items():
        both = {"variant": "wan22-t2v", "adapter": adapter, "options": SHIFTED, **trained}
        made |= {f"{kind}-{stages}": Case(stages=stages, resume_at=1 if stages > 1 else None, **both) for stages in (1, 2, 3)}
        made[f"{kind}-1x2"] = Case(replicas=2, **both)
        made[f"{kind}-1x2-zero"] = Case(replicas=2, **{**both, "optimizer": {**ADAMW, "zero": 1}})
        bf16 = {**both, "options": {**SHIFTED, "dtype": "bfloat16"}, "adapter": adapter and {**adapter, "dtype": "bfloat16"}}
        made |= {f"bf16-{kind}-{layout}": Case(**bf16, **how) for layout, how in {"1": {}, "1x2": {"replicas": 2}}.items()}
    lora = {"variant": "wan22-t2v", "adapter": LORA, **trained}
    made["two-steps"] = Case(options=SHIFTED, steps=2, **lora)
    made["checkpointing"] = Case(options=SHIFTED, stages=2, activation_checkpointing=True, **lora)
    made["idle"] = Case(resume_at=1, **lora)  # not shifted, the first four are all for low noise
    ends = r"transformer\.blocks\.3\.attn1\.to_q|transformer_2\.blocks\.0\.attn1\.to_q"
    uneven = {**lora, "adapter": {**LORA, "target_modules": ends}}
    made |= {f"uneven-{stages}": Case(options=SHIFTED, stages=stages, **uneven) for stages in (1, 3)}
    for name, (variant, options, _) in ALONE.items():
        for stages in (1, 2):
            made[f"{name}-{stages}"] = Case(variant, adapter=LORA, options=options, stages=stages, **trained)
    return made


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory) -> Cases:
    return Cases(cases(), tmp_path_factory.mktemp("experts"), tiny)


def of(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def first_values(settings: dict) -> dict[str, torch.Tensor]:
    """The adapter before the first step."""
    family, _, manager = open_case(settings)
    with torch.device("meta"):
        model = family.build_transformer()
        manager.attach(model)
    return perturbed(manager.first_values(trainable_parameters(model).items(), 0, family.weights()))


def test_the_micro_batches_of_these_tests_meet_both_experts(results):
    family, module, _ = open_case(results.settings("lora-1"))
    names = list(PREFIXES)
    routes = [names[int(prepared(family, module, index).inputs["expert"])] for index in range(12)]
    assert routes == [expert for step in ROUTES for expert in step]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_loss_and_gradients_are_those_of_the_chosen_experts_in_plain_diffusers(kind, results):
    found = results[f"{kind}-2"]
    assert_as_plain(found, *plain(results.settings(f"{kind}-2")))
    assert of(HIGH, found.gradients)
    assert of(LOW, found.gradients)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_any_stages_give_the_same_bits_also_resumed(kind, results):
    one = results[f"{kind}-1"]
    for other in (f"{kind}-2", f"{kind}-3"):
        assert_same_bits(one, results[other])


def test_activation_checkpointing_changes_no_bit(results):
    assert_same_bits(results["lora-1"], results["checkpointing"])


def test_experts_with_adapters_at_other_ends_of_the_model(results):
    """What needs a gradient at a stage boundary is another thing from micro-batch to micro-batch."""
    one = results["uneven-1"]
    assert of(HIGH, one.gradients)
    assert of(LOW, one.gradients)
    assert_same_bits(one, results["uneven-3"])


def assert_close(one: Result, other: Result, relative: float) -> None:
    assert other.losses == pytest.approx(one.losses, rel=relative)
    assert other.norms == pytest.approx(one.norms, rel=relative)
    assert other.gradients.keys() == one.gradients.keys()
    for name, gradient in one.gradients.items():
        assert (other.gradients[name] - gradient).norm() <= max(relative * gradient.norm(), 1e-6 * CLIP), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_replicas_that_run_different_experts_give_the_same_numbers(kind, results):
    assert_close(results[f"{kind}-1"], results[f"{kind}-1x2"], relative=1e-5)
    assert_same_bits(results[f"{kind}-1x2"], results[f"{kind}-1x2-zero"])
    # In fp32 the sums are the same but for rounding; a step in bf16 rounds more.
    one, two = results[f"bf16-{kind}-1"], results[f"bf16-{kind}-1x2"]
    assert two.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    assert two.norms[0] == pytest.approx(one.norms[0], rel=1e-5)
    assert two.norms == pytest.approx(one.norms, rel=1e-2)


def test_an_expert_without_a_micro_batch_keeps_its_weights_and_its_optimizer_state(results):
    two, three = results["two-steps"], results["lora-1"]
    assert are_equal(of(HIGH, two.weights), of(HIGH, three.weights))
    assert not are_equal(of(LOW, two.weights), of(LOW, three.weights))

    # Without one in the first step it has no state at all, and the checkpoint after that step is one to go on from.
    idle, start = results["idle"], first_values(results.settings("idle"))
    checkpoint = Checkpoint(next(results.folder.glob("*/idle/checkpoints/step-00000001")))
    assert checkpoint.problems() == []
    _, scalars = checkpoint.optimizer(start)
    assert {bool(entry["state"]) for name, entry in scalars.items() if name.startswith(HIGH)} == {False}
    assert {bool(entry["state"]) for name, entry in scalars.items() if name.startswith(LOW)} == {True}
    assert not of(HIGH, idle.gradients)
    # Later it has had some.
    assert not are_equal(of(HIGH, idle.weights), of(HIGH, start))


@pytest.mark.parametrize("name", ALONE)
def test_options_against_plain_diffusers_and_on_two_stages(name, results):
    variant, _, transformer = ALONE[name]
    model = reference.one_model(results.tiny(variant), transformer)
    assert_as_plain(results[f"{name}-2"], *plain(results.settings(f"{name}-2"), model))
    assert_same_bits(results[f"{name}-1"], results[f"{name}-2"])
