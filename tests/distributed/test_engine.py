"""The pipeline against the plain diffusers model, and against itself on other numbers of stages and replicas."""

from collections.abc import Collection

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from models import family_names, load_family
from tests.distributed.cases import Case, Cases, Result, selected
from tests.distributed.engine_worker import GLOBAL_BATCH, open_case, perturbed, prepared
from utils.adapters.manager import trainable_parameters
from utils.weights.named import canonical_name

SGD = {"type": "sgd", "lr": 0.5}
ADAMW = {"type": "adamw", "lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.01}
LORA = {"rank": 4, "alpha": 6.0}
# Every first norm is far above this, so that every step is clipped.
CLIP = 0.02

VARIANTS = [(name, variant) for name in family_names() for variant in load_family(name).variants]
KINDS = {"lora": LORA, "full": None}


# By default each variant is trained in one way on two stages and in the other on three, with --all in both ways on both.
DEFAULT_STAGES = {
    (variant, kind): (2, 3)[(number + order) % 2]
    for number, (_, variant) in enumerate(VARIANTS)
    for order, kind in enumerate(KINDS)
}
SEVERAL_STAGES = [
    pytest.param(f"{variant}-{kind}-{stages}", marks=() if stages == default else pytest.mark.slow)
    for (variant, kind), default in DEFAULT_STAGES.items()
    for stages in (2, 3)
]


def every_variant() -> dict[str, Case]:
    cases = {}
    for family, variant in VARIANTS:
        for kind, adapter in KINDS.items():
            # Of two and of three stages, so that both are resumed; AdamW has state to lose.
            common = {"adapter": adapter, "gradient_clipping": CLIP, "optimizer": ADAMW}
            for stages in (1, 2, 3):
                resume_at = 1 if stages > 1 else None
                cases[f"{variant}-{kind}-{stages}"] = Case(variant, family, stages=stages, resume_at=resume_at, **common)
    return cases


# By default each kind with one optimizer, and each optimizer with one kind.
KINDS_AND_OPTIMIZERS = [
    pytest.param(kind, name, marks=() if (kind, name) in (("lora", "adamw"), ("full", "sgd")) else pytest.mark.slow)
    for kind in KINDS
    for name in ("sgd", "adamw")
]


def detailed(optimizers: Collection[tuple[str, str]]) -> dict[str, Case]:
    """``optimizers``: the pairs of (kind, optimizer) that are tested."""
    cases = {}
    for kind, (adapter, variant) in {"lora": (LORA, "wan-i2v"), "full": (None, "wan-t2v")}.items():
        for name, optimizer in {"sgd": SGD, "adamw": ADAMW}.items():
            if (kind, name) not in optimizers:
                continue
            for stages, replicas in ((1, 1), (2, 1), (3, 1), (2, 2)):
                cases[f"{kind}-{name}-{stages}x{replicas}"] = Case(
                    variant,
                    adapter=adapter,
                    optimizer=optimizer,
                    steps=6,
                    gradient_clipping=CLIP,
                    stages=stages,
                    replicas=replicas,
                )
        bf16 = {"adapter": adapter and {**adapter, "dtype": "bfloat16"}, "options": {"dtype": "bfloat16"}, "optimizer": ADAMW}
        cases |= {f"bf16-{kind}-{stages}": Case("wan-t2v", gradient_clipping=CLIP, stages=stages, **bf16) for stages in (1, 2)}
    dropout = {"adapter": {**LORA, "dropout": 0.1}, "gradient_clipping": CLIP}
    cases["dropout-1"] = Case("wan-t2v", **dropout)
    cases["no-dropout-1"] = Case("wan-t2v", adapter=LORA, gradient_clipping=CLIP)
    cases["dropout-2"] = Case("wan-t2v", stages=2, activation_checkpointing=True, **dropout)
    for block in (0, 3):
        adapter = {**LORA, "target_modules": rf"blocks\.{block}\.attn1\.to_q"}
        cases |= {f"only-block-{block}-{stages}": Case("wan-t2v", adapter=adapter, stages=stages) for stages in (1, 3)}
    for stages, replicas in ((1, 1), (2, 1), (3, 1), (2, 2)):
        cases[f"uneven-{stages}x{replicas}"] = Case(
            "wan-t2v", adapter=LORA, optimizer=ADAMW, gradient_clipping=CLIP, stages=stages, replicas=replicas, uneven=True
        )
    cases["not-finite-2"] = Case("wan-t2v", adapter=LORA, stages=2, optimizer={**SGD, "lr": 1e30}, steps=4)
    return cases


CONVOLUTIONS = ["to_q", "conv1", "conv_shortcut", "downsamplers.0.conv"]
ADAPTERS = {
    **{kind: {"type": kind} for kind in ("rslora", "dora", "loha", "lokr")},
    "dora in bf16": {"type": "dora", "dtype": "bfloat16"},
    "dora with dropout": {"type": "dora", "dropout": 0.1},
    "lora on convolutions": {"target_modules": CONVOLUTIONS},
    "dora on convolutions": {"type": "dora", "target_modules": CONVOLUTIONS},
}


def adapter_kinds() -> dict[str, Case]:
    """Those of two stages are resumed, and compute their activations twice."""
    cases = {}
    for name, settings in ADAPTERS.items():
        adapter = {**LORA, "override": [{"modules": r".*blocks\.1\..*", "rank": 2, "alpha": 5.0}], **settings}
        family = {"variant": "sdxl", "family": "sdxl"} if "target_modules" in settings else {"variant": "wan-t2v"}
        options = {"dtype": "bfloat16"} if "dtype" in settings else {}
        common = {**family, "adapter": adapter, "options": options, "optimizer": ADAMW, "gradient_clipping": CLIP}
        cases[f"{name}-1"] = Case(**common)
        cases[f"{name}-2"] = Case(**common, stages=2, resume_at=1, activation_checkpointing=True)
    return cases


@pytest.fixture(scope="module")
def results(request, tiny, tmp_path_factory) -> Cases:
    left_out = {parameter.values[0] for parameter in SEVERAL_STAGES if parameter.marks} - {
        values.get("run") for values in selected(request)
    }
    variants = {name: case for name, case in every_variant().items() if name not in left_out}
    optimizers = {(values["kind"], values["optimizer"]) for values in selected(request) if "optimizer" in values}
    return Cases(variants | detailed(optimizers) | adapter_kinds(), tmp_path_factory.mktemp("engine"), tiny)


def plain(settings: dict, model: torch.nn.Module | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step's global batch, with the diffusers model (of the case, or another) called by hand."""
    family, reference, manager = open_case(settings)
    model = model or reference.plain_model(family.options.path)
    if manager:
        model.requires_grad_(False)
        config = manager.config
        inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=family.adapter_targets), model)
        first = perturbed(manager.first_values(trainable_parameters(model).items(), 0))
        for name, parameter in trainable_parameters(model).items():
            parameter.data.copy_(first[name])
    total = 0.0
    for index in range(GLOBAL_BATCH):
        micro_batch = prepared(family, reference, index, uneven=settings["uneven"])
        loss = family.loss({"prediction": reference.predict(model, micro_batch.inputs)}, micro_batch.target) / GLOBAL_BATCH
        loss.backward()
        total += float(loss.detach())
    return total, {canonical_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def num_different(one: Result, other: Result) -> int:
    """Steps, held-out losses and weights that are not the same bits."""
    pairs = [*zip(one.steps, other.steps, strict=True), *zip(one.held_out, other.held_out, strict=True)]
    weights = [torch.equal(other.weights[name], weight) for name, weight in one.weights.items()]
    return sum(left != right for left, right in pairs) + weights.count(False)


def assert_same_bits(one: Result, other: Result) -> None:
    assert other.steps == one.steps
    assert other.held_out == one.held_out
    assert other.weights.keys() == one.weights.keys()
    assert all(torch.equal(other.weights[name], one.weights[name]) for name in one.weights)


def assert_as_plain(found: Result, loss: float, gradients: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Loss, norm and gradients of the first step, which was clipped.

    Returns the relative difference of the loss, and the largest of a gradient.
    """
    assert found.losses[0] == pytest.approx(loss, rel=1e-5)
    assert found.gradients.keys() == gradients.keys()
    norm = float(torch.stack([gradient.double().pow(2).sum() for gradient in gradients.values()]).sum().sqrt())
    assert found.norms[0] == pytest.approx(norm, rel=1e-5)
    assert norm > CLIP
    largest = 0.0
    for name, gradient in gradients.items():
        expected = gradient * (CLIP / norm)
        # Some gradients are zero but for rounding; those are held against the whole gradient's norm.
        difference = (found.gradients[name] - expected).norm() / max(float(expected.norm()), 1e-6 * CLIP)
        assert difference <= 1e-5, f"{name}: relative difference {difference:.2e}"
        largest = max(largest, float(difference))
    return abs(found.losses[0] - loss) / loss, largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [variant for _, variant in VARIANTS])
def test_loss_and_every_gradient_equal_the_plain_diffusers_model(variant, kind, results, measured):
    name = f"{variant}-{kind}-{DEFAULT_STAGES[variant, kind]}"
    loss, gradient = assert_as_plain(results[name], *plain(results.settings(name)))
    measured(variant, "loss", loss)
    measured(variant, "gradients", gradient)


@pytest.mark.parametrize("run", SEVERAL_STAGES)
def test_every_variant_gives_the_same_bits_on_one_two_and_three_stages_and_resumed(run, results, measured):
    """The runs of two and three stages are stopped after the first step and built anew from a checkpoint."""
    variant, kind, _ = run.rsplit("-", 2)
    one = results[f"{variant}-{kind}-1"]
    assert len(set(one.losses)) == len(one.losses), "nothing was learnt, or every step saw the same batch"
    measured(variant, "stages", num_different(one, results[run]))
    assert_same_bits(one, results[run])


@pytest.mark.parametrize(("kind", "optimizer"), KINDS_AND_OPTIMIZERS)
def test_other_stages_give_the_same_bits_and_replicas_the_same_numbers(kind, optimizer, results):
    one = results[f"{kind}-{optimizer}-1x1"]
    assert all(norm > CLIP for norm in one.norms), "a step was not clipped"
    for stages in (2, 3):
        assert_same_bits(one, results[f"{kind}-{optimizer}-{stages}x1"])
    parallel = results[f"{kind}-{optimizer}-2x2"]
    assert parallel.losses == pytest.approx(one.losses, rel=1e-6)
    assert parallel.norms == pytest.approx(one.norms, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gives_the_same_bits_on_two_stages(kind, results):
    one = results[f"bf16-{kind}-1"]
    assert torch.bfloat16 in {weight.dtype for weight in one.weights.values()}
    assert_same_bits(one, results[f"bf16-{kind}-2"])


def test_dropout_and_activation_checkpointing_change_no_bit_over_stages(results):
    assert results["no-dropout-1"].steps != results["dropout-1"].steps, "dropout did nothing"
    assert_same_bits(results["dropout-1"], results["dropout-2"])


def test_micro_batches_of_other_sizes_with_masks_and_weights_train_as_they_are(results):
    """A micro-batch is the mean of its samples, and each counts the same in the step."""
    one = results["uneven-1x1"]
    assert_as_plain(one, *plain(results.settings("uneven-1x1")))
    for stages in (2, 3):
        assert_same_bits(one, results[f"uneven-{stages}x1"])
    parallel = results["uneven-2x2"]
    assert parallel.losses == pytest.approx(one.losses, rel=1e-6)
    assert parallel.norms == pytest.approx(one.norms, rel=1e-6)


@pytest.mark.parametrize("block", [0, 3])
def test_stages_without_trainable_parameters_train(block, results):
    """An adapter on the last block leaves nothing to train on the first stages, one on the first block nothing on the last."""
    assert_same_bits(results[f"only-block-{block}-1"], results[f"only-block-{block}-3"])


def test_a_step_that_is_not_finite_is_refused_on_every_stage(results):
    found = results["not-finite-2"]
    applied = [applied for _, _, applied in found.steps]
    assert applied[0]
    assert not applied[-1]
    assert all(torch.isfinite(weight).all() for weight in found.weights.values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter_gives_the_same_bits_on_two_stages_and_resumed(name, results):
    one = results[f"{name}-1"]
    assert len(set(one.losses)) == len(one.losses), "nothing was learnt, or every step saw the same batch"
    assert all(gradient.any() for gradient in one.gradients.values()), "a part of the adapter is not trained"
    assert_same_bits(one, results[f"{name}-2"])
