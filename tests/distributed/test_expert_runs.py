"""Whole runs of train.py with both transformers of Wan 2.2 A14B: killed and resumed, exported, started from their own files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from models import load_family
from models.assembly import build_layers, read_loras
from models.wan.experts import PREFIXES
from tests.distributed.harness import world
from tests.distributed.test_run import assert_same_tensors, losses_of
from tests.models.wan import reference
from utils.adapters.manager import trainable_parameters
from utils.checkpoints.checkpoint import Checkpoint
from utils.config.load import load_config
from utils.draw import Draw
from utils.errors import UserError
from utils.pipeline.layer import Stream
from utils.pipeline.stage_weights import fill_stage

ADAPTER = {"rank": 4, "alpha": 6}
FILES = {"transformer": "{}_high_noise.safetensors", "transformer_2": "{}_low_noise.safetensors"}


def options(model: Path, **more) -> dict:
    """Far shifted, so that both get their share of a few micro-batches."""
    return {"type": "wan", "path": str(model), "dtype": "float32", "shift": 8.0, **more}


def exports_of(run: Path) -> dict[str, Path]:
    """The two files of the last export, by the model's name in diffusers' pipeline."""
    newest = max((run / "exports").iterdir())
    found = {name: newest / file.format(run.name) for name, file in FILES.items()}
    assert sorted(newest.iterdir()) == sorted(found.values())
    return found


def predictions(config: Path, run: Path | None = None) -> dict[str, tuple[dict, torch.Tensor]]:
    """What the layers of a config compute, for each expert: (inputs, prediction).

    With the last checkpoint of ``run``, or as they are before the first step.
    """
    settings = load_config(config, lambda name: load_family(name).Options).run
    family = load_family("wan")(settings.model)
    transformer, layers, _, adapter = build_layers(settings, family)
    base, started_from = read_loras(settings, family, adapter, transformer)
    parameters = trainable_parameters(transformer)
    if run:
        trained = last_weights(run, parameters)
    else:
        trained = adapter.first_values(parameters.items(), settings.seed)
        for path, file in started_from.items():
            trained |= adapter.values_from(file, parameters.items(), path)
    fill_stage(transformer, layers, base, trained, torch.device("cpu"))
    found = {}
    for index in range(4):
        inputs = family.prepare_inputs(reference.batch(family, index), Draw(3, 0)).inputs
        stream = Stream(inputs)
        with torch.no_grad():
            for layer in layers:
                stream = layer.eval()(stream)
        found[reference.EXPERTS[int(inputs["expert"])]] = inputs, stream["prediction"]
    assert found.keys() == set(reference.EXPERTS)
    return found


def last_weights(run: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(max(folder for folder in (run / "checkpoints").iterdir() if Checkpoint.is_one(folder)))
    assert checkpoint.problems() == []
    return checkpoint.weights(names)


@torch.no_grad()
def plain(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    return reference.predict(model.eval(), {name: tensor for name, tensor in inputs.items() if name != "expert"})


def test_killed_and_resumed_and_both_files_load_in_diffusers(workspace, tiny):
    """Two stages; image to video, a LoRA."""
    model = tiny("wan22-i2v")
    settings = {"model": options(model), "adapter": ADAPTER, "pipeline_stages": 2, "max_steps": 6}
    said = workspace.train(workspace.config("straight", model, **settings), processes=2)
    assert "both transformers of Wan 2.2 I2V-A14B are trained" in said
    straight, killed = workspace.run("straight"), workspace.run("killed")
    config = workspace.config("killed", model, **settings)
    with world(["train.py", "--config", config], 2, workspace.folder) as running:
        running.wait_until((killed / "checkpoints/step-00000003").is_dir)
        running.kill()
    assert not (killed / "exports").exists(), "the run was over before it was killed"
    assert "continuing from step" in workspace.train(config, "--resume", processes=2)
    assert losses_of(killed) == losses_of(straight)
    for name, file in exports_of(killed).items():
        assert_same_tensors(file, exports_of(straight)[name])

    pipeline = WanImageToVideoPipeline.from_pretrained(model)
    trained = predictions(config, straight)
    for name, file in exports_of(straight).items():
        inputs, ours = trained[name]
        network, keys = getattr(pipeline, name), set(load_file(file))
        assert (plain(network, inputs) - ours).abs().max() > 1e-3, "the adapter changes nothing, so nothing would be shown"
        pipeline.load_lora_weights(file, adapter_name=name, load_into_transformer_2=name == "transformer_2")
        assert 2 * len([module for module, _ in network.named_modules() if module.endswith(f"lora_A.{name}")]) == len(keys)
        assert (plain(network, inputs) - ours).abs().max() <= 1e-5

    # A new run starts from both, or on a base with both, as it was; from one alone the other expert is as released.
    files = [str(file) for file in exports_of(straight).values()]
    new = {**settings, "adapter": {"rank": 4}}
    started = workspace.config("started", model, **{**settings, "adapter": {"rank": 4, "alpha": 1, "init_from": files[::-1]}})
    half = workspace.config("half", model, **{**settings, "adapter": {"rank": 4, "init_from": files[0]}})
    merged = workspace.config(
        "merged", model, **{**new, "model": options(model, merge_adapters=[{"path": file} for file in files])}
    )
    untrained = predictions(workspace.config("new", model, **new))
    for name, (_, ours) in trained.items():
        for other in (started, merged):
            assert (predictions(other)[name][1] - ours).abs().max() <= 1e-5
        expected = ours if name == "transformer" else untrained[name][1]
        assert (predictions(half)[name][1] - expected).abs().max() <= 1e-5
    copy = shutil.copy(files[0], workspace.folder / "again_high_noise.safetensors")
    twice = workspace.config("twice", model, **{**settings, "adapter": {"rank": 4, "init_from": [files[0], str(copy)]}})
    with pytest.raises(UserError, match=r"again_high_noise\.safetensors are of the same modules; name one of them"):
        predictions(twice)

    # Each says what a file of its expert alone would, and nothing of this machine.
    Family = load_family("wan")
    for expert, file in zip(PREFIXES, exports_of(straight).values(), strict=True):
        alone = Family(Family.Options(**options(model, expert=expert))).export_metadata()
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["modelspec.architecture"] == f"{alone.pop('modelspec.architecture')}/lora"
        assert alone.items() <= metadata.items()
        assert metadata["ss_network_alpha"] == "6"
        assert str(workspace.folder) not in json.dumps(metadata)


def test_full_fine_tunes_are_two_files_that_are_read_again(workspace, tiny):
    model = tiny("wan22-t2v")
    full = {"adapter": None, "optimizer": {"type": "sgd", "lr": 0.1}, "max_steps": 2}
    config = workspace.config("run", model, model=options(model), **full)
    workspace.train(config)
    run = workspace.run("run")
    trained = predictions(config, run)
    for name, file in exports_of(run).items():
        inputs, ours = trained[name]
        base = WanTransformer3DModel.from_pretrained(model / name)
        assert (plain(base, inputs) - ours).abs().max() > 1e-3
        single = WanTransformer3DModel.from_single_file(file, config=str(model), subfolder=name)
        assert (plain(single, inputs) - ours).abs().max() <= 1e-5

    # An adapter for one of them alone, and a file that may be of either, are refused before anything is loaded.
    config = workspace.config("wrong", model, adapter={"rank": 4, "target_modules": r"transformer_2\..*\.to_q"})
    said = workspace.train(config, "--check", expect=2)
    assert "adapter.target_modules matches nothing below 'transformer.', which is exported as a file of its own" in said
    unclear = workspace.folder / "style.safetensors"
    config = workspace.config("unclear", model, adapter={"rank": 4, "init_from": str(unclear)})
    assert f"{unclear} cannot be read" in workspace.train(config, "--check", expect=2)
