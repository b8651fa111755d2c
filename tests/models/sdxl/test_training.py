"""SDXL over pipeline stages: with trained text encoders, and with each of its ways to predict and to weigh the loss."""

import pytest
import torch

from models.sdxl.tiny import write_tiny
from tests.distributed.cases import Case, Cases
from tests.distributed.engine_worker import GLOBAL_BATCH, open_case, prepared
from tests.models.sdxl.test_text_encoders import BOTH, ONE, TWO

ADAMW = {"type": "adamw", "lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.01}
LORA = {"rank": 4, "alpha": 6.0}
V_PREDICTION = {"prediction": "v_prediction"}
# The UNet's stages have nothing to train then, and hand on the gradient.
ALONE = {**LORA, "target_modules": r"text_encoder.*\.mlp\.fc1"}
TEXT_ENCODERS = {
    "lora": (LORA, BOTH),
    "full": (None, BOTH),
    "lora-1": (LORA, ONE),
    "full-2": (None, TWO),
    "alone": (ALONE, BOTH),
    "bf16": ({**LORA, "dtype": "bfloat16"}, BOTH | {"dtype": "bfloat16"}),
}
STAGES = {name: (1, 2, 3) if name in ("lora", "full") else (1, 3) for name in TEXT_ENCODERS}
OPTIONS = {
    "v-prediction": V_PREDICTION,
    "v-prediction-without-zero-snr": V_PREDICTION | {"zero_terminal_snr": False},
    "min-snr": {"min_snr_gamma": 5.0},
    "min-snr-v": V_PREDICTION | {"min_snr_gamma": 5.0},
    "debiased": {"debiased_estimation_loss": True},
    "debiased-v": V_PREDICTION | {"debiased_estimation_loss": True},
    "noise-offset": {"noise_offset": 0.1},
}


def cases() -> dict[str, Case]:
    made = {}
    for name, (adapter, options) in TEXT_ENCODERS.items():
        # Those of several stages are resumed; AdamW has state to lose.
        for stages in STAGES[name]:
            told = {"adapter": adapter, "options": options, "optimizer": ADAMW, "gradient_clipping": 0.02, "steps": 2}
            more = {"resume_at": 1 if stages > 1 else None, "activation_checkpointing": stages == 3}
            made[f"{name}-{stages}"] = Case("sdxl", "sdxl", stages=stages, **more, **told)
    return made | {name: Case("sdxl", "sdxl", options=options, stages=2, steps=2) for name, options in OPTIONS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Cases:
    folder = tmp_path_factory.mktemp("engine")
    write_tiny("sdxl", folder / "model", "diffusers", seed=1)
    return Cases(cases(), folder, lambda variant: folder / "model")


def assert_same_bits(one, other) -> None:
    assert other.steps == one.steps
    assert other.held_out == one.held_out
    assert other.weights.keys() == one.weights.keys()
    assert all(torch.equal(other.weights[name], one.weights[name]) for name in one.weights)


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_trained_text_encoders_give_the_same_bits_on_other_stages_and_resumed(name, results):
    one = results[f"{name}-1"]
    assert len(set(one.losses)) == len(one.losses)
    trained = {"text_encoder_1_lr": "text_encoder.", "text_encoder_2_lr": "text_encoder_2."}
    for key, prefix in trained.items():
        own = [gradient for weight, gradient in one.gradients.items() if weight.startswith(prefix)]
        assert bool(own) is (key in TEXT_ENCODERS[name][1])
        assert all(torch.count_nonzero(gradient) for gradient in own)
    for stages in STAGES[name][1:]:
        assert_same_bits(one, results[f"{name}-{stages}"])


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_of_each_option_is_that_of_the_plain_diffusers_model(name, results):
    """That the options feed the network and the loss rightly is shown in ``test_family.py``: here, that a training uses it."""
    family, reference, _ = open_case(results.settings(name))
    unet, losses = reference.plain_model(family.options.path), []
    for index in range(GLOBAL_BATCH):
        batch = prepared(family, reference, index)
        with torch.no_grad():
            losses.append(float(family.loss({"prediction": reference.predict(unet, batch.inputs)}, batch.target)))
    assert results[name].losses[0] == pytest.approx(sum(losses) / GLOBAL_BATCH, rel=1e-5)


def test_the_options_train_differently(results):
    for step in (0, 1):
        assert len({results[name].losses[step] for name in OPTIONS}) == len(OPTIONS)
