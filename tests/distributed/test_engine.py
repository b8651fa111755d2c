"""The pipeline against the plain diffusers model, and against itself on other numbers of stages and replicas."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from models import load_family
from tests.distributed.engine_worker import GLOBAL_BATCH, batch, perturbed
from tests.distributed.harness import run_world
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.checkpoints.weights import canonical_name
from utils.config.schema import AdapterConfig
from utils.draw import Draw

SGD = {"type": "sgd", "lr": 0.5}
ADAMW = {"type": "adamw", "lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.01}
LORA = {"rank": 4, "alpha": 6.0}


def settings_for(model: Path, /, **changes) -> dict:
    return {
        "model": {"type": "wan", "path": str(model), "dtype": "float32"},
        "adapter": LORA,
        "optimizer": SGD,
        "stages": 1,
        "steps": 6,
        "gradient_clipping": 0.0,
        **changes,
    }


def train(folder: Path, settings: dict, replicas: int = 1) -> dict:
    """Run the worker; its report, gradients of the first step and final weights of all stages."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    run_world(["-m", "tests.distributed.engine_worker", folder / "settings.json"], settings["stages"] * replicas, folder)
    report = json.loads((folder / "results.json").read_text())
    for kind in ("gradients", "weights"):
        report[kind] = {name: value for file in folder.glob(f"{kind}-*.safetensors") for name, value in load_file(file).items()}
    return report


def plain_model(settings: dict) -> tuple[dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """Weights, loss and gradients of the first step's global batch, with the diffusers model called by hand."""
    Family = load_family("wan")
    family = Family(Family.Options.model_validate(settings["model"]))
    model = WanTransformer3DModel.from_pretrained(Path(settings["model"]["path"]) / "transformer").train()
    if settings["adapter"]:
        model.requires_grad_(False)
        rank, alpha = LORA["rank"], LORA["alpha"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=family.adapter_targets), model)
        manager = AdapterManager(AdapterConfig(**settings["adapter"]), family.adapter_targets)
        first = perturbed(manager.first_values(trainable_parameters(model).items(), 0))
        for name, parameter in trainable_parameters(model).items():
            parameter.data.copy_(first[name])
    sizes = {"text_dim": family.config["text_dim"], "image_dim": family.config.get("image_dim")}
    total = 0.0
    for index in range(GLOBAL_BATCH):
        prepared = family.prepare_inputs(batch(index, sizes), Draw(3, 0))
        inputs = prepared.inputs
        prediction = model(
            hidden_states=inputs["x"],
            timestep=inputs["t"],
            encoder_hidden_states=inputs["text"],
            encoder_hidden_states_image=inputs.get("clip"),
            return_dict=False,
        )[0]
        loss = ((prediction - prepared.target["velocity"]) ** 2).mean() / GLOBAL_BATCH
        loss.backward()
        total += float(loss.detach())
    gradients = {canonical_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return trainable_parameters(model), total, gradients


@pytest.mark.parametrize("variant", ["wan-t2v", "wan-i2v"])
@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_loss_and_every_gradient_equal_the_plain_diffusers_model(variant, adapter, tiny, tmp_path):
    settings = settings_for(tiny(variant), adapter=adapter, stages=2, steps=1)
    report = train(tmp_path / "run", settings)
    weights, loss, gradients = plain_model(settings)
    assert float.fromhex(report["steps"][0][0]) == pytest.approx(loss, rel=1e-5)
    assert report["gradients"].keys() == gradients.keys()
    assert report["weights"].keys() == weights.keys()
    for name, gradient in gradients.items():
        difference = (report["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert difference <= 1e-5, f"{name}: relative difference {difference:.2e}"
    norm = torch.stack([gradient.double().pow(2).sum() for gradient in gradients.values()]).sum().sqrt()
    assert float.fromhex(report["steps"][0][1]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_other_stages_give_the_same_bits_and_replicas_the_same_numbers(adapter, optimizer, tiny, tmp_path):
    variant = "wan-i2v" if adapter else "wan-t2v"
    # The norm is far above 0.02, so that every step is clipped.
    settings = settings_for(tiny(variant), adapter=adapter, optimizer=optimizer, gradient_clipping=0.02)
    one = train(tmp_path / "1", settings)
    assert all(float.fromhex(norm) > 0.02 for _, norm, _ in one["steps"])
    losses = [float.fromhex(loss) for loss, _, _ in one["steps"]]
    assert len(set(losses)) == len(losses), "nothing was learnt, or every step saw the same batch"
    for stages in (2, 3):
        other = train(tmp_path / str(stages), {**settings, "stages": stages})
        assert other["steps"] == one["steps"], f"{stages} stages"
        assert other["held_out"] == one["held_out"], f"{stages} stages"
        assert all(torch.equal(other["weights"][name], one["weights"][name]) for name in one["weights"]), f"{stages} stages"
    parallel = train(tmp_path / "2x2", {**settings, "stages": 2}, replicas=2)
    for (loss, norm, _), (its_loss, its_norm, _) in zip(one["steps"], parallel["steps"], strict=True):
        assert float.fromhex(its_loss) == pytest.approx(float.fromhex(loss), rel=1e-6)
        assert float.fromhex(its_norm) == pytest.approx(float.fromhex(norm), rel=1e-6)


def test_dropout_and_activation_checkpointing_change_no_bit_over_stages(tiny, tmp_path):
    settings = settings_for(tiny("wan-t2v"), adapter={**LORA, "dropout": 0.1}, gradient_clipping=0.02)
    one = train(tmp_path / "1", settings)
    without = train(tmp_path / "no-dropout", {**settings, "adapter": LORA})
    assert without["steps"] != one["steps"], "dropout did nothing"
    two = train(tmp_path / "2", {**settings, "stages": 2, "activation_checkpointing": True})
    assert two["steps"] == one["steps"]
    assert all(torch.equal(two["weights"][name], one["weights"][name]) for name in one["weights"])


@pytest.mark.parametrize("adapter", [{**LORA, "dtype": "bfloat16"}, None], ids=["lora", "full"])
def test_bf16_gives_the_same_bits_on_two_stages(adapter, tiny, tmp_path):
    model = {"type": "wan", "path": str(tiny("wan-t2v")), "dtype": "bfloat16"}
    settings = settings_for(tiny("wan-t2v"), model=model, adapter=adapter, optimizer=ADAMW, gradient_clipping=0.02, steps=3)
    one = train(tmp_path / "1", settings)
    assert {weight.dtype for weight in one["weights"].values()} >= {torch.bfloat16}
    two = train(tmp_path / "2", {**settings, "stages": 2})
    assert two["steps"] == one["steps"]
    assert all(torch.equal(two["weights"][name], one["weights"][name]) for name in one["weights"])


def test_a_stage_without_trainable_parameters_trains(tiny, tmp_path):
    # Only block 3 has an adapter: the first of three stages is frozen altogether.
    adapter = {**LORA, "target_modules": r"blocks\.3\.attn1\.to_q"}
    one = train(tmp_path / "1", settings_for(tiny("wan-t2v"), adapter=adapter))
    three = train(tmp_path / "3", settings_for(tiny("wan-t2v"), adapter=adapter, stages=3))
    assert three["steps"] == one["steps"]
    # And only block 0: the last stage has nothing to train but passes gradients on.
    adapter = {**LORA, "target_modules": r"blocks\.0\.attn1\.to_q"}
    one = train(tmp_path / "first-1", settings_for(tiny("wan-t2v"), adapter=adapter))
    three = train(tmp_path / "first-3", settings_for(tiny("wan-t2v"), adapter=adapter, stages=3))
    assert three["steps"] == one["steps"]


def test_a_step_that_is_not_finite_is_refused_on_every_stage(tiny, tmp_path):
    settings = settings_for(tiny("wan-t2v"), stages=2, optimizer={**SGD, "lr": 1e30}, steps=4)
    report = train(tmp_path / "run", settings)
    applied = [applied for _, _, applied in report["steps"]]
    assert applied[0]
    assert not applied[-1]
    assert all(torch.isfinite(weight).all() for weight in report["weights"].values())
