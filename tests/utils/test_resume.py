"""What may change between a checkpoint and the config that continues it, and what the log says of it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.utils.data.orders import BUCKETS, RULES, sample
from utils.checkpoints.checkpoint import Checkpoint, Progress, sealed
from utils.config.schema import RunConfig
from utils.data.batches.order import EpochOrder
from utils.data.batches.sizes import BatchSizes
from utils.errors import UserError
from utils.resume import refuse_other_weights, report_resume
from utils.schedule import Schedule, data_fingerprint

LORA = {"type": "lora", "rank": 4, "alpha": 6.0}
WEIGHTS = {"blocks.0.q.lora_A.weight": torch.zeros(4, 8), "blocks.0.q.lora_B.weight": torch.zeros(8, 4)}


def run_config(**changes) -> RunConfig:
    table = {
        "output_dir": "runs",
        "dataset": "data.toml",
        "epochs": 4,
        "model": {"type": "wan"},
        "adapter": LORA,
        "optimizer": {"type": "adamw", "lr": 1e-3},
        **changes,
    }
    return RunConfig.model_validate(table)


def record_of(config: RunConfig, **changes) -> dict:
    """As train.py makes it: settings without paths, and without what is not set."""
    settings = config.model_dump(exclude_none=True, exclude={"output_dir", "dataset"})
    return {"settings": settings, "variant": "wan-t2v", "data": "abc", **changes}


@pytest.fixture
def written(tmp_path):
    """A checkpoint of two replicas, with the settings that are given."""

    def write(weights=WEIGHTS, **record) -> Checkpoint:
        save_file(weights, tmp_path / "weights-000-000.safetensors")
        manifest = {
            "version": 2,
            "files": {"weights-000-000.safetensors": {}, "optimizer-000-000.safetensors": {}},
            "record": record or record_of(run_config()),
            "written_by": {"stages": 1, "replicas": 2},
        }
        (tmp_path / "manifest.json").write_text(sealed(manifest))
        return Checkpoint(tmp_path)

    return write


def refusal(checkpoint: Checkpoint, record: dict, weights=WEIGHTS) -> str:
    with pytest.raises(UserError) as raised:
        refuse_other_weights(checkpoint, record, weights)
    return str(raised.value)


def test_the_same_config_and_free_changes_are_accepted(written):
    free = {
        "adapter": {**LORA, "type": "lora", "dropout": 0.1},
        "optimizer": {"type": "AdamW", "lr": 1e-5, "zero": 1, "weight_decay": 0.1},
        "pipeline_stages": 4,
        "epochs": 9,
        "ema": {"decay": 0.99},
        "seed": 5,
    }
    for changes in ({}, free, {"adapter": {**LORA, "target_modules": None}}):
        refuse_other_weights(written(), record_of(run_config(**changes)), WEIGHTS)


def test_an_alpha_that_is_the_rank_is_the_default(written):
    checkpoint = written(**record_of(run_config(adapter={"rank": 4})))
    refuse_other_weights(checkpoint, record_of(run_config(adapter={"rank": 4, "alpha": 4.0})), WEIGHTS)
    assert "adapter.alpha was 4, is 8.0" in refusal(checkpoint, record_of(run_config(adapter={"rank": 4, "alpha": 8.0})))


def test_a_setting_that_is_younger_than_the_checkpoint_has_had_its_default(written):
    record = json.loads(json.dumps(record_of(run_config())))
    for key in ("dropout", "override"):
        record["settings"]["adapter"].pop(key)
    for key in ("zero", "part_lr", "master_weights"):
        record["settings"]["optimizer"].pop(key)
    record.pop("variant")
    refuse_other_weights(written(**record), record_of(run_config()), WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {**LORA, "rank": 8}}, "adapter.rank was 4, is 8"),
        ({"adapter": {**LORA, "alpha": 4.0}}, "adapter.alpha was 6.0, is 4.0"),
        ({"adapter": {**LORA, "type": "rslora"}}, "adapter.type was 'lora', is 'rslora'"),
        ({"adapter": {**LORA, "target_modules": ["to_q"]}}, "adapter.target_modules was not set, is ['to_q']"),
        ({"adapter": {**LORA, "dtype": "bfloat16"}}, "adapter.dtype was 'float32', is 'bfloat16'"),
        ({"adapter": None}, "written with an [adapter], this run has no [adapter] (full fine-tuning)"),
        ({"optimizer": {"type": "sgd", "lr": 1.0}}, "optimizer.type was 'adamw', is 'sgd'"),
        ({"model": {"type": "flux"}}, "model.type was 'wan', is 'flux'"),
    ],
)
def test_what_may_not_change_is_refused_with_its_key(changes, message, written):
    said = refusal(written(), record_of(run_config(**changes)))
    assert message in said
    assert "Set back what changed, or start another run" in said


def test_everything_that_may_not_change_is_said_at_once(written):
    now = record_of(run_config(adapter={**LORA, "rank": 8}, optimizer={"type": "sgd", "lr": 1.0}), variant="wan-i2v")
    said = refusal(written(), now)
    assert [part in said for part in ("adapter.rank", "optimizer.type", "the model's variant was 'wan-t2v'")] == [True] * 3
    assert "[adapter] init_from" in said
    full = record_of(run_config(adapter=None))
    assert "[model] transformer_path" in refusal(written(**full), record_of(run_config(adapter=None), variant="wan-i2v"))


def test_another_set_of_weights_is_refused_with_what_changed(written):
    half = {"blocks.0.q.lora_A.weight": WEIGHTS["blocks.0.q.lora_A.weight"]}
    now = record_of(run_config(optimizer={"type": "adamw", "lr": 1e-3, "part_lr": {"feed_forward": 0.0}}))
    said = refusal(written(), now, half)
    assert "1 weights are in the checkpoint and not trained by this run (blocks.0.q.lora_B.weight)" in said
    assert "changed: optimizer.part_lr.feed_forward was not set, is 0.0" in said
    said = refusal(written(half), record_of(run_config()))
    assert "1 weights are trained by this run and not in the checkpoint" in said
    assert "the model's files are others" in said
    low = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    assert "2 weights are of another dtype" in refusal(written(), record_of(run_config()), low)
    longer = {name: torch.zeros(4, 4) for name in WEIGHTS}
    assert "2 weights are of another shape" in refusal(written(), record_of(run_config()), longer)


def test_other_master_weights_are_refused_only_where_there_are_any(written):
    low = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    now = record_of(run_config(optimizer={"type": "adamw", "lr": 1e-3, "master_weights": False}))
    assert "optimizer.master_weights was True, is False" in refusal(written(low), now, low)
    refuse_other_weights(written(), now, WEIGHTS)


SAMPLES = [sample(number, BUCKETS[0]) for number in range(48)]
DATA = data_fingerprint(EpochOrder(SAMPLES, 1, 0))


def reported(checkpoint: Checkpoint, caplog, replicas: int, samples=SAMPLES, **changes) -> str:
    """In the middle of the first of four epochs."""
    config, progress = run_config(**changes), Progress(3, 0, 24, 24)
    order = EpochOrder(samples, BatchSizes.of(dict(config), RULES), config.seed)
    schedule = Schedule.of(config, order, replicas, progress)
    with caplog.at_level("INFO"):
        report_resume(checkpoint, record_of(config, data=data_fingerprint(order)), progress, order, schedule, 1e-4)
    return "\n".join(entry.message for entry in caplog.records)


BEFORE = {"micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}


def test_the_same_run_is_only_continued(written, caplog):
    checkpoint = written(**record_of(run_config(**BEFORE), data=DATA))
    said = reported(checkpoint, caplog, 2, **BEFORE)
    assert said.startswith("continuing from step 3 (epoch 1)")
    assert "written by 1 stage(s) x 2 replica(s), to step 24; learning rate 0.0001" in said


def test_replicas_that_became_accumulation_change_only_rounding(written, caplog):
    checkpoint = written(**record_of(run_config(**BEFORE), data=DATA))
    said = reported(checkpoint, caplog, 1, **{**BEFORE, "gradient_accumulation_steps": 4})
    assert "the global batch stays 8 samples (micro-batch 2 x accumulation 4 x replicas 1): the same samples and noise" in said
    assert "changed since the checkpoint: gradient_accumulation_steps was 2, is 4" in said


def test_another_batch_is_told_with_its_effect_and_how_to_keep_it(written, caplog):
    checkpoint = written(**record_of(run_config(**BEFORE), data=DATA))
    said = reported(checkpoint, caplog, 1, **BEFORE)
    assert "the global batch was 8 samples (micro-batch 2 x accumulation 2 x replicas 2), is 4 samples" in said
    assert "gradient_accumulation_steps = 4 would keep it" in said
    # 24 of 48 samples are done, then three epochs more: 6 + 36 steps.
    assert "from step 3, sample 24 of epoch 1, on an epoch has 12 steps instead of 6, and the run ends after step 45" in said


def test_another_micro_batch_size_is_told_to_change_the_order(written, caplog):
    checkpoint = written(**record_of(run_config(**BEFORE), data=DATA))
    said = reported(checkpoint, caplog, 2, micro_batch_size_per_gpu=4, gradient_accumulation_steps=1)
    assert "micro_batch_size_per_gpu was 2, is 4" in said
    assert "a micro-batch had 2 samples, has 4: samples are put together in another way, so some samples of epoch 1 are" in said
    assert "the global batch was" not in said
    assert "the same samples and noise" not in said


# 24 pictures and 24 clips.  A budget of 96 tokens has room for 6 and 2 of them, one of 64 for 4 and 1.
MIXED = [sample(number, BUCKETS[number % 2]) for number in range(48)]
BUDGET = {"max_tokens_per_micro_batch": 96, "gradient_accumulation_steps": 2}


def test_a_budget_of_tokens_that_stays_is_no_change(written, caplog):
    checkpoint = written(**record_of(run_config(**BUDGET), data=data_fingerprint(EpochOrder(MIXED, 1, 0))))
    said = reported(checkpoint, caplog, 2, MIXED, **BUDGET)
    assert said.startswith("continuing from step 3 (epoch 1)")
    said = reported(checkpoint, caplog, 1, MIXED, **{**BUDGET, "gradient_accumulation_steps": 4})
    assert "the global batch stays 4 micro-batches (accumulation 4 x replicas 1) of 2 to 6 samples" in said


def test_another_budget_of_tokens_is_told_with_the_buckets_it_changes(written, caplog):
    checkpoint = written(**record_of(run_config(**BUDGET), data="abc"))
    said = reported(checkpoint, caplog, 2, MIXED, **{**BUDGET, "max_tokens_per_micro_batch": 64})
    assert "a micro-batch had 6 of 64x64x1, 2 of 64x64x9 samples, has 4 of 64x64x1, 1 of 64x64x9: samples are put together" in said
    assert "the global batch" not in said


def test_another_number_of_micro_batches_is_told_with_its_effect(written, caplog):
    checkpoint = written(**record_of(run_config(**BUDGET), data="abc"))
    said = reported(checkpoint, caplog, 1, MIXED, **BUDGET)
    assert "the global batch was 4 micro-batches (accumulation 2 x replicas 2) of 2 to 6 samples, is 2 micro-batches" in said
    assert "gradient_accumulation_steps = 4 would keep it" in said
    # 24 / 6 + 24 / 2 micro-batches an epoch.
    assert "on an epoch has 8 steps instead of 4" in said


def test_a_checkpoint_of_one_size_goes_on_with_a_budget(written, caplog):
    checkpoint = written(**record_of(run_config(**BEFORE), data="abc"))
    said = reported(checkpoint, caplog, 2, MIXED, **BUDGET)
    assert "a micro-batch had 2 of 64x64x1 samples, has 6 of 64x64x1" in said


def test_other_data_and_new_settings(written, caplog):
    record = json.loads(json.dumps(record_of(run_config(**BEFORE), data="other")))
    record["settings"].pop("max_bad_steps")  # of an older version
    said = reported(written(**record), caplog, 2, **BEFORE, ema={"decay": 0.5}, optimizer={"type": "adamw", "lr": 1e-4})
    assert "the data set is not the one of the checkpoint" in said
    assert "max_bad_steps" not in said
    assert "ema.decay was not set, is 0.5" in said
    assert "optimizer.lr was 0.001, is 0.0001" in said
