"""A checkpoint of any stages x replicas goes on with any other: the whole state arrives, and the steps are the same ones."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.cases import Case, Cases, selected
from tests.distributed.test_engine import ADAMW, CLIP, LORA, assert_same_bits
from tests.distributed.test_run import steps_of
from utils.checkpoints.checkpoint import Checkpoint
from utils.checkpoints.manager import CheckpointManager

KINDS = {"lora": LORA, "full": None}
OPTIMIZERS = {"adamw": ADAMW, "adafactor": {"type": "adafactor", "lr": 1e-2}}
EMA = {"decay": 0.9, "evaluate": True}
FIRST, LAST = 2, 3
# Stages x replicas, before and after.
ONLY_STAGES = [("1x1", "2x1"), ("2x1", "1x1"), ("3x1", "2x1")]
REPLICAS_TOO = [("2x1", "1x2"), ("1x2", "2x2")]
# bf16 weights, which have fp32 copies with the optimizer.
BF16 = {"variant": "wan-t2v", "options": {"dtype": "bfloat16"}, "optimizer": ADAMW}
SETTINGS = {
    **{
        f"{kind}-{name}": {"variant": "wan-t2v", "adapter": adapter, "optimizer": optimizer}
        for kind, adapter in KINDS.items()
        for name, optimizer in OPTIMIZERS.items()
    },
    "bf16-full": {**BF16, "adapter": None},
    "bf16-lora": {**BF16, "adapter": {**LORA, "dtype": "bfloat16"}},
}
# Others that ZeRO must not change either: several classes, an average of its own, quantised state, its own Kahan summation.
ALSO_SHARED = {
    "muon": {"adapter": LORA},
    "adamw_schedulefree": {"adapter": LORA, "options": {"dtype": "bfloat16"}},
    "adamw8bit": {"adapter": None},
    "stableadamw": {"adapter": None, "options": {"dtype": "bfloat16"}},
}
WHOLE = [name for name in SETTINGS if not name.startswith("bf16")]


def transitions(settings: str) -> list[tuple[str, str, int, int]]:
    """(before, after, ZeRO before, ZeRO after)"""
    if settings not in WHOLE:
        return [("1x2", "2x1", 1, 0), ("2x1", "1x2", 0, 1)]
    return [(before, after, zero, zero) for before, after in ONLY_STAGES + REPLICAS_TOO for zero in (0, 1)]


def layout_divided(settings: str) -> str:
    return "2x2" if settings in WHOLE else "1x2"


def case(settings: str, layout: str, zero: int, **changes) -> Case:
    stages, replicas = map(int, layout.split("x"))
    given = SETTINGS[settings]
    given = {**given, "optimizer": {**given["optimizer"], "zero": zero}, "gradient_clipping": CLIP, "ema": EMA}
    return Case(stages=stages, replicas=replicas, **given, **changes)


def cases_of(moves: Iterable[tuple[str, str, str, int, int]], divided: Iterable[str]) -> dict[str, Case]:
    """What these transitions and divided settings, and the other tests, compare."""
    cases = {}
    for settings, before, after, zero_before, zero_after in moves:
        source = f"{settings} {before} {zero_before}"
        cases[source] = case(settings, before, zero_before, steps=FIRST, saves=True)
        cases[f"{source} to {after} {zero_after}"] = case(settings, after, zero_after, steps=LAST, continues=source)
        straight = "1x1" if settings in WHOLE else "1x2"
        cases[f"{settings} straight {straight} 0"] = case(settings, straight, 0, steps=LAST)
    for settings in divided:
        for zero in (0, 1):
            layout = layout_divided(settings)
            cases[f"{settings} straight {layout} {zero}"] = case(settings, layout, zero, steps=LAST)
        cases[f"{settings} 1x2 1"] = case(settings, "1x2", 1, steps=FIRST, saves=True)
    switched_on = case("bf16-full", "1x1", 0, steps=FIRST, continues="without average")
    cases |= {"without average": replace(switched_on, saves=True, continues=None, ema=None), "switched on": switched_on}
    for name, changes in ALSO_SHARED.items():
        for zero in (0, 1):
            shared = {"optimizer": {"type": name, "lr": 1e-3, "zero": zero}, "steps": LAST, "resume_at": FIRST, **changes}
            cases[f"{name} {zero}"] = Case("wan-t2v", replicas=2, gradient_clipping=CLIP, **shared)
    return cases


@pytest.fixture(scope="module")
def results(request, tiny, tmp_path_factory) -> Cases:
    asked = [values for values in selected(request) if "settings" in values]
    names = ("settings", "before", "after", "zero_before", "zero_after")
    moves = [tuple(values[name] for name in names) for values in asked if "before" in values]
    divided = [values["settings"] for values in asked if "before" not in values]
    return Cases(cases_of(moves, divided), tmp_path_factory.mktemp("elastic"), tiny)


def contents(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict]:
    """All tensors by kind and name, and the scalars by kind; no name may be in two files of a kind."""
    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.manifest["files"]:
        kind = file.partition("-")[0]
        for name, tensor in load_file(checkpoint.folder / file).items():
            assert f"{kind} {name}" not in tensors, f"{name} is in two files"
            tensors[f"{kind} {name}"] = tensor
    return tensors, checkpoint.manifest["scalars"]


def checkpoint_of(results: Cases, name: str) -> Checkpoint:
    assert results[name]
    return CheckpointManager(results.folder_of(name), None).latest()


# With --all everything with everything.  By default each transition once without ZeRO and once with it, of the other kind and with
# the other optimizer, so that any two of these things come together.
def by_default(settings: str, before: str, after: str, zero: int) -> bool:
    if settings not in WHOLE:
        return True
    place = (ONLY_STAGES + REPLICAS_TOO).index((before, after))
    first, second = (("lora-adamw", "full-adafactor"), ("full-adamw", "lora-adafactor"))[place % 2]
    return settings == ((first, second) if place % 4 < 2 else (second, first))[zero]


EVERY_TRANSITION = [
    pytest.param(settings, *transition, marks=() if by_default(settings, *transition[:3]) else pytest.mark.slow)
    for settings in SETTINGS
    for transition in transitions(settings)
]
# Of those that are divided over four processes, by default one of each kind and optimizer.
LONGER = ("lora-adafactor", "full-adamw")


@pytest.mark.parametrize(("settings", "before", "after", "zero_before", "zero_after"), EVERY_TRANSITION)
def test_the_run_goes_on_with_all_it_had(settings, before, after, zero_before, zero_after, results):
    source = f"{settings} {before} {zero_before}"
    name = f"{source} to {after} {zero_after}"
    (tensors, scalars), (arrived, scalars_arrived) = (contents(checkpoint_of(results, which)) for which in (source, name))
    assert {key.split()[0] for key in tensors} == {"weights", "optimizer", "ema"}
    assert arrived.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert arrived[key].dtype == tensor.dtype, key
        assert torch.equal(arrived[key], tensor), key
    assert scalars_arrived == scalars

    went_on = results[name]
    if settings not in WHOLE:
        straight = results[f"{settings} straight 1x2 0"]
        assert went_on.losses == pytest.approx(straight.losses[FIRST:], rel=1e-2)
        return
    straight = results[f"{settings} straight 1x1 0"]
    if (before, after) in ONLY_STAGES:
        assert went_on.steps == straight.steps[FIRST:]
        assert went_on.held_out == straight.held_out
        assert all(torch.equal(went_on.weights[name], straight.weights[name]) for name in straight.weights)
    else:
        assert went_on.losses == pytest.approx(straight.losses[FIRST:], rel=1e-5)
        assert went_on.norms == pytest.approx(straight.norms[FIRST:], rel=1e-4)


@pytest.mark.parametrize("settings", [pytest.param(name, marks=pytest.mark.slow if name in LONGER else ()) for name in SETTINGS])
def test_zero_changes_no_bit_and_divides_the_state(settings, results):
    layout = layout_divided(settings)
    assert_same_bits(results[f"{settings} straight {layout} 0"], results[f"{settings} straight {layout} 1"])
    checkpoint = checkpoint_of(results, f"{settings} 1x2 1")
    masters_or_averages = [load_file(file) for file in sorted(checkpoint.folder.glob("ema-*"))]
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in masters_or_averages]
    assert len(sizes) == 2
    assert max(sizes) < 0.55 * sum(sizes)


@pytest.mark.parametrize("optimizer", ALSO_SHARED)
def test_zero_changes_no_bit_of_other_optimizers(optimizer, results):
    assert_same_bits(results[f"{optimizer} 0"], results[f"{optimizer} 1"])


def test_an_average_that_is_switched_on_begins_with_the_weights(results):
    """In their fp32 copies, of those that have one."""
    tensors, scalars = contents(checkpoint_of(results, "switched on"))
    averages = {key.removeprefix("ema "): tensor for key, tensor in tensors.items() if key.startswith("ema ")}
    assert averages.keys() == results["switched on"].weights.keys()
    for name, average in averages.items():
        assert torch.equal(average, tensors.get(f"optimizer {name}::master", tensors[f"weights {name}"]))
    assert scalars["ema"] == {"updates": 0}


def test_a_run_moves_from_gpus_to_other_gpus(workspace, tiny):
    """A full fine-tune with a frozen part, rates by part, ZeRO and an average, against the same on one process without ZeRO."""
    model = tiny("wan-t2v")
    parts = {"embedders": 0.0, "self_attention": 2e-3}
    optimizer = {"type": "adamw", "lr": 1e-3, "part_lr": parts}
    full = {"adapter": None, "ema": {"decay": 0.9}, "warmup_steps": 3}
    workspace.train(workspace.config("straight", model, **full, optimizer=optimizer, max_steps=6))

    said = ""
    for stages, replicas, steps in ((1, 2, 2), (2, 1, 4), (2, 2, 6)):
        layout = {"pipeline_stages": stages, "gradient_accumulation_steps": 4 // replicas, "max_steps": steps}
        config = workspace.config("moved", model, **full, **layout, optimizer={**optimizer, "zero": 1})
        said += workspace.train(config, *(["--resume"] if said else []), processes=stages * replicas)
    assert "continuing from step 2 (epoch 1) of step-00000002, written by 1 stage(s) x 2 replica(s), to step 4" in said
    assert "the global batch stays 4 samples (micro-batch 1 x accumulation 2 x replicas 2)" in said
    assert "learning rate of embedders: 0, it is frozen" in said
    assert "optimizer.zero = 1 has no effect" in said

    straight, moved = (steps_of(workspace.run(name)) for name in ("straight", "moved"))
    assert [line["step"] for line in moved] == list(range(1, 7))
    for one, other in zip(straight, moved, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert (other["lr"], other["lr_self_attention"]) == (one["lr"], one["lr_self_attention"])
        assert one["lr_self_attention"] == pytest.approx(2 * one["lr"])

    exported = load_file(workspace.run("moved") / "exports" / "step-00000006" / "moved.safetensors")
    average = load_file(workspace.run("moved") / "exports" / "step-00000006" / "moved_ema.safetensors")
    base = load_file(tiny("wan-t2v", "released") / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == average.keys() == base.keys()
    for name in base:
        frozen = re.match(r"(patch|text|time)_embedding", name) is not None
        for values in (exported, average):
            assert torch.equal(values[name], base[name]) == frozen, name
        assert frozen or not torch.equal(exported[name], average[name])


def test_bad_steps_end_a_run_that_keeps_the_last_good_weights_and_a_refused_resume_changes_nothing(workspace, tiny):
    model = tiny("wan-t2v")
    settings = {"optimizer": {"type": "adamw", "lr": 1e25}, "checkpoint_every_n_steps": 1, "keep_last": 9, "max_bad_steps": 2}
    said = workspace.train(workspace.config("run", model, **settings), expect=2)
    assert "the loss or the gradient was not finite in 2 steps in a row (max_bad_steps), up to step 3" in said
    assert "The checkpoint has the weights of step 1 and continues behind these samples" in said
    run = workspace.run("run")
    refused = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == "refused_step"]
    assert [line["step"] for line in refused] == [2, 3]
    for line in refused:
        assert len(line["samples"]) == 4
        assert f"step {line['step']} was skipped, no weight was changed: loss nan" in said
        assert all(sample in said for sample in line["samples"])
    good, bad = (Checkpoint(run / "checkpoints" / f"step-{step:08d}") for step in (1, 3))
    assert (good.progress.samples, bad.progress.samples) == (4, 12)
    (tensors, scalars), (kept, kept_scalars) = contents(good), contents(bad)
    assert scalars == kept_scalars
    assert all(torch.equal(kept[key], tensor) for key, tensor in tensors.items())

    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    changed = {**settings, "optimizer": {"type": "sgd", "lr": 1e-3}, "adapter": {"rank": 4, "alpha": 6, "target_modules": ["to_q"]}}
    said = workspace.train(workspace.config("run", model, **changed), "--resume", good.folder, expect=2)
    assert "step-00000001 cannot be continued with this config" in said
    assert "adapter.target_modules was not set, is ['to_q']" in said
    assert "optimizer.type was 'adamw', is 'sgd'" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
