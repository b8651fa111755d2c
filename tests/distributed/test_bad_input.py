"""Bad input is refused before hours are spent, with a message that names the thing, what is allowed and the way out."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from models import load_family
from models.check import check
from utils.config.load import load_config
from utils.errors import UserError


def refused(config: Path, *overrides: str) -> str:
    """What ``train.py --check`` refuses the config with."""
    with pytest.raises(UserError) as raised:
        check(load_config(config, lambda name: load_family(name).Options, overrides))
    return str(raised.value)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny("wan-i2v"), tmp_path / "model"))


def transformer_file(model: Path) -> Path:
    return next((model / "transformer").glob("*.safetensors"))


def dataset_of(workspace, clips: Path, **changes) -> None:
    settings = {"resolutions": [48], "frame_buckets": [1, 5], **changes}
    lines = [f"{key} = {value!r}".replace("True", "true") for key, value in settings.items()]
    workspace.dataset.write_text("\n".join(lines) + f"\n[[directory]]\npath = {str(clips)!r}\n")


def test_a_good_config_passes(workspace, model):
    assert check(load_config(workspace.config("run", model), lambda name: load_family(name).Options)) == 0


def test_unknown_key_with_a_near_match(workspace, model):
    message = refused(workspace.config("run", model, gradient_acumulation_steps=2))
    assert "gradient_acumulation_steps" in message
    assert "did you mean `gradient_accumulation_steps`" in message
    assert "run.toml:" in message


def test_wrong_type_and_rank_0_at_once(workspace, model):
    message = refused(workspace.config("run", model, pipeline_stages="two", adapter={"rank": 0}))
    assert "pipeline_stages" in message
    assert "'two'" in message
    assert "adapter.rank" in message
    assert "2 problems" in message


def test_frames_that_are_not_4k_plus_1(workspace, model, clips):
    dataset_of(workspace, clips, frame_buckets=[1, 10])
    message = refused(workspace.config("run", model))
    assert "frame_buckets" in message
    assert "10" in message
    assert "4k + 1" in message
    assert "9" in message
    assert "13" in message


def test_missing_weights_file(workspace, model):
    transformer_file(model).unlink()
    message = refused(workspace.config("run", model))
    assert "transformer" in message
    assert "transformer_path" in message


def test_truncated_safetensors(workspace, model):
    file = transformer_file(model)
    os.truncate(file, file.stat().st_size - 100)
    message = refused(workspace.config("run", model))
    assert file.name in message
    assert "the download is incomplete" in message


def test_weights_of_another_family(workspace, model):
    # FLUX.1's names in the file that should be Wan's.
    names = ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "single_blocks.0.linear1.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, transformer_file(model))
    message = refused(workspace.config("run", model))
    assert "holds FLUX" in message
    assert "type = 'wan'" in message


def test_a_weight_that_is_missing_in_the_file(workspace, model):
    weights = load_file(transformer_file(model))
    weights.pop("blocks.1.attn1.to_q.weight")
    save_file(weights, transformer_file(model), {"format": "pt"})
    message = refused(workspace.config("run", model))
    assert "1 weight is missing: blocks.1.attn1.to_q.weight" in message


def test_a_caption_without_a_clip_and_a_clip_without_a_caption(workspace, model, copied_clips):
    clip = next(copied_clips.glob("*.mp4"))
    clip.rename(clip.with_name("renamed.mp4"))
    dataset_of(workspace, copied_clips)
    message = refused(workspace.config("run", model))
    assert f"{clip.stem}.txt" in message
    assert "renamed.mp4" in message


def test_a_clip_that_does_not_decode(workspace, model, copied_clips):
    clip = next(copied_clips.glob("*.mp4"))
    clip.write_bytes(clip.read_bytes()[:2000])
    dataset_of(workspace, copied_clips)
    assert clip.name in refused(workspace.config("run", model))


def test_an_empty_dataset(workspace, model, tmp_path):
    (tmp_path / "empty").mkdir()
    dataset_of(workspace, tmp_path / "empty")
    assert str(tmp_path / "empty") in refused(workspace.config("run", model))


def test_more_stages_than_layers(workspace, model):
    assert "pipeline_stages = 7, but the model has only 6 layers; use at most 6" in refused(
        workspace.config("run", model, pipeline_stages=7)
    )


def test_an_adapter_pattern_that_matches_nothing(workspace, model):
    message = refused(workspace.config("run", model, adapter={"rank": 4, "target_modules": ["to_qq"]}))
    assert "adapter.target_modules = ['to_qq'] matches no module of the model" in message
    assert "blocks." in message


def test_an_optimizer_key_that_it_does_not_take(workspace, model):
    said = workspace.train(workspace.config("run", model, optimizer={"type": "adamw", "lr": 1e-3, "beta": [0.9, 0.9]}), expect=2)
    assert "betas" in said


def test_stages_that_do_not_divide_the_processes(workspace, model):
    said = workspace.train(workspace.config("run", model, pipeline_stages=2), processes=3, expect=2)
    assert said.count("pipeline_stages = 2 does not divide the 3 processes of this run; use 1, 3, or start") == 1, (
        "one rank says it"
    )


def test_an_output_folder_that_cannot_be_written(workspace, model):
    (workspace.folder / "runs").write_text("a file is in the way")
    said = workspace.train(workspace.config("run", model), expect=2)
    assert "output_dir: the run's folder" in said
    assert "cannot be written" in said


def test_a_run_that_is_there_is_not_overwritten(workspace, model):
    config = workspace.config("run", model, max_steps=1)
    workspace.train(config)
    said = workspace.train(config, expect=2)
    assert "has checkpoints already; start with --resume to continue it" in said
    assert "the run is finished" in workspace.train(config, "--resume")


def test_resume_without_a_checkpoint(workspace, model):
    said = workspace.train(workspace.config("run", model), "--resume", expect=2)
    assert "cannot be continued: it has no checkpoint" in said


def test_an_optimizer_that_couples_parameters_is_refused_on_stages(workspace, model):
    pytest.importorskip("prodigyopt")
    config = workspace.config("run", model, optimizer={"type": "prodigy", "lr": 1.0}, pipeline_stages=2)
    said = workspace.train(config, processes=2, expect=2)
    assert "optimizer.type = 'prodigy' computes one value from all parameters" in said


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"optimizer": {"type": "prodigy", "lr": 1.0, "zero": 1, "part_lr": {"embedders": 2.0}}},
            ["zero = 1", "by part", "prodigy"],
        ),
        (
            {"optimizer": {"type": "adamw_schedulefree", "lr": 1.0}, "ema": {"decay": 0.9}},
            ["[ema]", "averages the weights by itself"],
        ),
        (
            {"optimizer": {"type": "adamw", "lr": 1.0, "part_lr": {"embeders": 1.0, "nothing": 0.0}}},
            ["optimizer.part_lr.embeders is no part", "did you mean `embedders`", "optimizer.part_lr.nothing", "cross_attention"],
        ),
    ],
)
def test_what_does_not_go_with_the_optimizer(workspace, model, settings, parts):
    run = load_config(workspace.config("run", model, **settings), lambda name: load_family(name).Options).run
    with pytest.raises(UserError) as raised:
        train.refuse_optimizer(run)
    assert [part for part in parts if part not in str(raised.value)] == []


def test_a_run_in_which_everything_is_frozen(workspace, model):
    optimizer = {"type": "adamw", "lr": 1.0, "part_lr": dict.fromkeys(load_family("wan").parts, 0.0)}
    assert "nothing is trained" in refused(workspace.config("full", model, adapter=None, optimizer=optimizer))
    assert "learning rate is 0" in " ".join(refused(workspace.config("lora", model, optimizer=optimizer)).split())


def test_an_editing_model_without_control_pictures(workspace, tiny, clips, tmp_path):
    """Told before anything is loaded or encoded, by --check and by a run; and the same of pictures for a model that takes none."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(next(clips.glob("*.png")), pictures / "a.png")
    (pictures / "a.txt").write_text("a picture")
    dataset_of(workspace, pictures, frame_buckets=[1], resolutions=[64])
    model = {"type": "flux", "path": str(tiny("flux1-kontext")), "dtype": "float32"}
    config = workspace.config("edit", tiny("flux1-kontext"), model=model, cache_dir=str(tmp_path / "new_cache"))
    said = "there is no control_path, and this model takes one or more control pictures for each item"
    assert said in refused(config)
    assert said in workspace.train(config, expect=2)
    assert not list((tmp_path / "new_cache").rglob("*.safetensors"))

    with workspace.dataset.open("a") as file:
        file.write(f"control_path = {str(pictures)!r}\n")
    assert check(load_config(config, lambda name: load_family(name).Options)) == 0
    assert "control_path names 1 folder, and this model takes no control pictures" in refused(config, 'model.variant="dev"')
