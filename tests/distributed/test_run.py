"""Whole runs of train.py on real clips: killed and resumed, exported and loaded by diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from models import load_family
from tests.distributed.harness import world
from utils.adapters.manager import trainable_parameters
from utils.checkpoints.checkpoint import Checkpoint
from utils.pipeline.layer import PipelineLayer, Stream
from utils.pipeline.stage_weights import fill_stage


def steps_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def losses_of(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in steps_of(run)]


def export_of(run: Path) -> Path:
    newest = max((run / "exports").iterdir())
    return next(newest.glob("*.safetensors"))


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_killed_and_resumed_equals_straight_bit_for_bit(workspace, tiny, dropout):
    """Two stages; 16 micro-batches an epoch and 4 a step, so that step 3 is in the middle of an epoch."""
    model = tiny("wan-i2v", "released")
    adapter = {"rank": 4, "alpha": 6, "dropout": dropout}
    if dropout:  # and captions that vary: three orders of the words of each of the eight, and none
        varied = f'shuffle_tags = true\ntag_delimiter = " "\ncaption_variants = 3\ncaption_dropout = {dropout}\n'
        workspace.dataset.write_text(varied + workspace.dataset.read_text())
    straight = workspace.config("straight", model, adapter=adapter, pipeline_stages=2)
    said = workspace.train(straight, processes=2)
    assert f"text: {8 * 3 + 1 if dropout else 8} different inputs" in said

    killed = workspace.config("killed", model, adapter=adapter, pipeline_stages=2)
    checkpoint = workspace.run("killed") / "checkpoints" / "step-00000003"
    with world(["train.py", "--config", killed], 2, workspace.folder) as running:
        running.wait_until(checkpoint.is_dir)
        running.kill()
    assert not (workspace.run("killed") / "exports").exists(), "the run was over before it was killed"

    said = workspace.train(killed, "--resume", processes=2)
    assert "continuing from step" in said
    assert losses_of(workspace.run("killed")) == losses_of(workspace.run("straight"))
    assert [line["step"] for line in steps_of(workspace.run("killed"))] == list(range(1, 9))
    assert_same_tensors(export_of(workspace.run("killed")), export_of(workspace.run("straight")))


def test_a_checkpoint_of_two_stages_continues_on_one_and_on_three(workspace, tiny):
    model = tiny("wan-t2v")
    full = {"adapter": None, "optimizer": {"type": "adamw", "lr": 1e-3}, "max_steps": 5}
    workspace.train(workspace.config("straight", model, **full), processes=1)
    workspace.train(workspace.config("on-1", model, **{**full, "max_steps": 3}, pipeline_stages=2), processes=2)
    shutil.copytree(workspace.run("on-1"), workspace.run("on-3"))
    for stages in (1, 3):
        name = f"on-{stages}"
        said = workspace.train(workspace.config(name, model, **full, pipeline_stages=stages), "--resume", processes=stages)
        assert "continuing from step 3" in said
        assert losses_of(workspace.run(name)) == losses_of(workspace.run("straight"))
        assert_same_tensors(export_of(workspace.run(name)), export_of(workspace.run("straight")))


def test_replicas_share_the_global_batch_and_evaluation_is_the_same_everywhere(workspace, tiny):
    """16 micro-batches an epoch; the held-out loss is measured every epoch, the export named after it."""
    model = tiny("wan-t2v")
    settings = {
        "max_steps": 5,
        "optimizer": {"type": "sgd", "lr": 0.5},
        "eval_datasets": [{"name": "held-out", "config": str(workspace.dataset)}],
        "eval_every_n_epochs": 1,
        "eval_timesteps": [0.3, 0.7],
        "save_every_n_epochs": 1,
    }
    runs = {"1x1": (1, 1, 4), "2x1": (2, 1, 4), "1x2": (1, 2, 2)}
    for name, (stages, replicas, accumulation) in runs.items():
        config = workspace.config(name, model, **settings, pipeline_stages=stages, gradient_accumulation_steps=accumulation)
        workspace.train(config, processes=stages * replicas)

    def evals(name: str) -> list[dict]:
        lines = map(json.loads, (workspace.run(name) / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == "eval"]

    straight = losses_of(workspace.run("1x1"))
    assert [line["step"] for line in evals("1x1")] == [0, 4]
    assert evals("1x1")[0]["loss"] != evals("1x1")[1]["loss"]
    assert {"loss_at_0.3", "loss_at_0.7"} <= evals("1x1")[0].keys()
    assert losses_of(workspace.run("2x1")) == straight
    assert evals("2x1") == evals("1x1")
    for (_, loss, norm), (_, its_loss, its_norm) in zip(straight, losses_of(workspace.run("1x2")), strict=True):
        assert its_loss == pytest.approx(loss, rel=1e-6)
        assert its_norm == pytest.approx(norm, rel=1e-6)
    for one, other in zip(evals("1x1"), evals("1x2"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert sorted(folder.name for folder in (workspace.run("1x1") / "exports").iterdir()) == ["epoch-0001", "step-00000005"]


def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_is_taken(workspace, tiny):
    model = tiny("wan-t2v")
    config = workspace.config("run", model, max_steps=6)
    workspace.train(config)
    whole = losses_of(workspace.run("run"))
    damaged = workspace.run("run") / "checkpoints" / "step-00000006" / "weights-000-000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    said = workspace.train(config, "--resume")
    assert "checkpoint step-00000006 is damaged and is passed over" in said
    assert "weights-000-000.safetensors does not have the content it was written with" in said
    assert "continuing from step 3" in said
    assert losses_of(workspace.run("run")) == whole
    said = workspace.train(config, "--resume", damaged.parent.with_name("set-aside-step-00000006"), expect=2)
    assert "this checkpoint is damaged (the newest whole one is" in said


def test_best_checkpoints_are_kept(workspace, tiny):
    """Evaluated after each of the steps, with a learning rate that makes the loss go up and down."""
    changes = {
        "max_steps": 6,
        "checkpoint_every_n_steps": 100,
        "optimizer": {"type": "sgd", "lr": 3.0},
        "eval_datasets": [{"name": "held-out", "config": str(workspace.dataset)}],
        "eval_every_n_steps": 1,
        "eval_before_first_step": False,
        "eval_timesteps": [0.5],
        "keep_last": 1,
        "keep_best": 2,
    }
    workspace.train(workspace.config("run", tiny("wan-t2v"), **changes))
    lines = [json.loads(line) for line in (workspace.run("run") / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "eval"}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    expected = {*sorted(losses, key=losses.get)[:2], 6}
    found = {Checkpoint(folder) for folder in (workspace.run("run") / "checkpoints").iterdir()}
    assert {checkpoint.progress.step: checkpoint.eval_loss for checkpoint in found} == {step: losses[step] for step in expected}


def test_a_second_start_encodes_nothing_and_a_changed_caption_one_caption(workspace, tiny, copied_clips):
    workspace.dataset.write_text(f"resolutions = [48]\nframe_buckets = [1, 5]\n[[directory]]\npath = {str(copied_clips)!r}\n")
    model = tiny("wan-i2v")
    config = workspace.config("run", model, cache_dir=str(workspace.folder / "cache"), max_steps=1)
    assert "8 different inputs, 0 in the cache, 8 encoded here" in workspace.train(config, "--cache-only")
    assert not (workspace.run("run") / "checkpoints").exists()
    caption = next(copied_clips.glob("*.txt"))
    caption.write_text("something else altogether")
    said = workspace.train(config, "--cache-only")
    assert "vae: 8 different inputs, 8 in the cache, 0 encoded here" in said
    assert "text: 8 different inputs, 7 in the cache, 1 encoded here" in said


def base_model(model: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(model / "transformer").eval()


def example_inputs(model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(1, model.config.in_channels, 2, 6, 8),
        "t": torch.tensor([700.0]),
        "text": torch.randn(1, 512, model.config.text_dim),
    }
    return inputs | ({"clip": torch.randn(1, 257, model.config.image_dim)} if model.config.image_dim else {})


def prediction(model: WanTransformer3DModel) -> torch.Tensor:
    """The diffusers model's own forward."""
    inputs = example_inputs(model)
    with torch.no_grad():
        return model(inputs["x"], inputs["t"], inputs["text"], inputs.get("clip"), return_dict=False)[0]


def layered_prediction(layers: list[PipelineLayer], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our pipeline layers, one after the other."""
    stream = Stream(inputs)
    with torch.no_grad():
        for layer in layers:
            stream = layer(stream)
    return stream["prediction"]


def trained_prediction(run: Path, model: Path, adapter: dict | None) -> torch.Tensor:
    """Our layers with the weights of the run's last checkpoint, as they were trained."""
    Family = load_family("wan")
    transformer = base_model(model)
    if adapter:
        targets = Family.adapter_targets
        inject_adapter_in_model(LoraConfig(r=adapter["rank"], lora_alpha=adapter["alpha"], target_modules=targets), transformer)
    trained = load_file(max((run / "checkpoints").iterdir()) / "weights-000-000.safetensors")
    parameters = trainable_parameters(transformer)
    for name, value in trained.items():
        parameters[name].data.copy_(value)
    family = Family(Family.Options(type="wan", path=model, dtype="float32"))
    return layered_prediction(family.layers(transformer), example_inputs(transformer))


@pytest.mark.parametrize(("variant", "pipeline"), [("wan-t2v", WanPipeline), ("wan-i2v", WanImageToVideoPipeline)])
def test_the_lora_of_a_run_loads_whole_in_diffusers_and_computes_the_same(workspace, tiny, variant, pipeline):
    model = tiny(variant)
    adapter = {"rank": 4, "alpha": 6}
    workspace.train(workspace.config("run", model, adapter=adapter, max_steps=3))
    run = workspace.run("run")
    trained = trained_prediction(run, model, adapter)
    base = base_model(model)
    assert (prediction(base) - trained).abs().max() > 1e-3, "the adapter changes nothing, so nothing would be shown"

    file = export_of(run)
    keys = set(load_file(file))
    assert all(key.startswith("diffusion_model.blocks.") for key in keys)
    loaded = pipeline.from_pretrained(model)
    loaded.load_lora_weights(file, adapter_name="trained")
    transformer = loaded.transformer.eval()
    assert 2 * len([name for name, _ in transformer.named_modules() if name.endswith("lora_A.trained")]) == len(keys)
    assert (prediction(transformer) - trained).abs().max() <= 1e-5


def test_a_run_starts_from_a_lora_or_on_a_base_with_one(workspace, tiny):
    """With a learning rate of 0 the new run's first loss tells which model it began with."""
    model = tiny("wan-t2v")
    workspace.train(workspace.config("first", model, adapter={"rank": 4, "alpha": 6}, max_steps=3))
    lora = str(export_of(workspace.run("first")))
    frozen = {"optimizer": {"type": "sgd", "lr": 0.0}, "max_steps": 1}
    merged = {"type": "wan", "path": str(model), "dtype": "float32", "merge_adapters": [{"path": lora}]}
    runs = {
        "plain": {"adapter": {"rank": 4}},
        "started": {"adapter": {"rank": 4, "alpha": 1, "init_from": lora}},
        "merged": {"adapter": {"rank": 4}, "model": merged},
    }
    for name, changes in runs.items():
        workspace.train(workspace.config(name, model, **changes, **frozen))
    plain, started, merged = (losses_of(workspace.run(name))[0][1] for name in runs)
    assert abs(started - plain) > 1e-5
    assert started == pytest.approx(merged, rel=1e-6)
    wrong = workspace.config("wrong", model, adapter={"rank": 8, "init_from": lora})
    said = workspace.train(wrong, "--check", expect=2)
    assert "has rank 4 for blocks.0.attn1.to_q, adapter.rank = 8; set adapter.rank to the file's" in said


def test_no_path_of_the_user_is_in_an_export(workspace, tiny):
    workspace.train(workspace.config("run", tiny("wan-t2v"), max_steps=1))
    with safe_open(export_of(workspace.run("run")), "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"].startswith("wan2.1-t2v")
    assert metadata["ss_network_alpha"] == "6"
    for path in (workspace.folder, workspace.cache, Path.home()):
        assert str(path) not in json.dumps(metadata)


def test_a_full_fine_tune_loads_again_by_us_and_by_diffusers(workspace, tiny):
    model = tiny("wan-t2v", "diffusers")
    config = workspace.config("run", model, adapter=None, optimizer={"type": "sgd", "lr": 0.1}, max_steps=3)
    workspace.train(config)
    run = workspace.run("run")
    file = export_of(run)
    trained = trained_prediction(run, model, None)
    assert (prediction(base_model(model)) - trained).abs().max() > 1e-3
    single = WanTransformer3DModel.from_single_file(file, config=str(model), subfolder="transformer").eval()
    assert (prediction(single) - trained).abs().max() <= 1e-5

    # By us: the file names the weights, the folder everything else.
    shutil.copy(model / "transformer" / "config.json", file.with_suffix(".json"))
    Family = load_family("wan")
    family = Family(Family.Options(type="wan", path=model, transformer_path=file, dtype="float32"))
    with torch.device("meta"):
        transformer = family.build_transformer()
        layers = family.layers(transformer)
    fill_stage(transformer, layers, family.weights(), {}, torch.device("cpu"))
    assert (layered_prediction(layers, example_inputs(transformer)) - trained).abs().max() <= 1e-5
