"""Continuing from a checkpoint under a config that may have changed, on other GPUs than before.

The rule: what is in the checkpoint (weights, optimizer state, the number of steps, the position in the data) goes on; what is in
the config counts from the next step on, as if it had always been so.  The learning rate is the config's rate times its schedule at
that step, of the steps that the run now has.  What would make the checkpoint's weights mean something else is refused.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from pydantic_core import PydanticUndefined
from torch import Tensor

from utils.checkpoints.checkpoint import Checkpoint, Progress, differences, kind_of
from utils.config.describe import table_of
from utils.config.schema import AdapterConfig, RunConfig
from utils.data.batches.order import EpochOrder
from utils.data.batches.sizes import BatchSizes
from utils.errors import UserError, listed
from utils.schedule import GlobalBatch, Schedule
from utils.weights.tensor_files import SafetensorsFile, TensorInfo

log = logging.getLogger(__name__)

# What may change between checkpoint and config of an adapter: it shapes neither the weights nor what they compute.
_FREE_IN_ADAPTER = {"dropout", "init_from"}
_WAY_OUT = "Set back what changed, or start another run (a new run_name), which can begin with this run's export: {start}"
_STARTS = {True: "[adapter] init_from", False: "[model] transformer_path"}
NAMED_WEIGHTS = 3
NAMED_BUCKETS = 4


def refuse_other_weights(checkpoint: Checkpoint, record: Mapping[str, Any], trained: Mapping[str, Tensor]) -> None:
    """Raises UserError, with every key, if this run cannot continue the checkpoint.

    ``record``: what this run would write into a checkpoint.  ``trained``: its trainable weights by name, of the whole model, on
    whatever device.
    """
    before, now = checkpoint.record, json.loads(json.dumps(record))
    was, is_now = before["settings"], now["settings"]
    problems = [
        f"{_change(key, old, new)}: it is another model"
        for key, old, new in (
            ("model.type", was["model"]["type"], is_now["model"]["type"]),
            ("the model's variant", before.get("variant", now["variant"]), now["variant"]),
        )
        if old != new
    ]
    problems += _adapter_problems(was.get("adapter"), is_now.get("adapter"))
    old, new = was["optimizer"], is_now["optimizer"]
    if old["type"].lower() != new["type"].lower():
        problems.append(f"optimizer.type was {old['type']!r}, is {new['type']!r}: its state means nothing to the other")
    low = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in trained.values())
    if low and (masters := old.get("master_weights", True)) != new["master_weights"]:
        problems.append(f"optimizer.master_weights was {masters}, is {new['master_weights']}: the weights are kept in another form")
    if not problems:
        problems = _weight_problems(_weights_of(checkpoint), trained, was, is_now)
    if problems:
        heading = f"{checkpoint.folder.name} cannot be continued with this config. {_WAY_OUT}"
        raise UserError(listed(problems, heading.format(start=_STARTS["adapter" in is_now]) + "."))


def _adapter_problems(was: Mapping[str, Any] | None, is_now: Mapping[str, Any] | None) -> list[str]:
    if was is None or is_now is None:
        names = {True: "no [adapter] (full fine-tuning)", False: "an [adapter]"}
        return [] if was is is_now else [f"it was written with {names[was is None]}, this run has {names[is_now is None]}"]

    def value(settings: Mapping[str, Any], key: str) -> Any:
        default = AdapterConfig.model_fields[key].get_default(call_default_factory=True)
        return settings.get(key, settings["rank"] if key == "alpha" else default)

    pairs = {key: (value(was, key), value(is_now, key)) for key in AdapterConfig.model_fields if key not in _FREE_IN_ADAPTER}
    return [f"{_change(f'adapter.{key}', old, new)}: it is another adapter" for key, (old, new) in pairs.items() if old != new]


def _change(key: str, old: Any, new: Any) -> str:
    was, is_now = ("not set" if value is None else repr(value) for value in (old, new))
    return f"{key} was {was}, is {is_now}"


def _weights_of(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file in checkpoint.manifest["files"]:
        if kind_of(file) == "weights":
            found |= SafetensorsFile(checkpoint.folder / file).entries
    return found


def _weight_problems(
    written: Mapping[str, TensorInfo], trained: Mapping[str, Tensor], was: Mapping[str, Any], is_now: Mapping[str, Any]
) -> list[str]:
    """Weights that are in one set only, or of another shape or dtype, and the settings that may be why."""
    kinds = {
        "trained by this run and not in the checkpoint": [name for name in trained if name not in written],
        "in the checkpoint and not trained by this run": [name for name in written if name not in trained],
        "of another shape": [name for name in trained if name in written and tuple(trained[name].shape) != written[name].shape],
        "of another dtype": [name for name in trained if name in written and trained[name].dtype != written[name].dtype],
    }
    changed = [
        _change(key, old, new)
        for key, old, new in differences(was, is_now)
        if (key.startswith(("model.", "optimizer.part_lr")) or (key == "optimizer.lr" and 0 in (old, new)))
        and (old is not None or new != _default(key))
    ]
    why = f"; changed: {', '.join(changed)}" if changed else "; the model's files are others than those of the checkpoint"
    return [
        f"{len(names)} weights are {kind} ({', '.join(names[:NAMED_WEIGHTS])}{', …' if len(names) > NAMED_WEIGHTS else ''}){why}"
        for kind, names in kinds.items()
        if names
    ]


def _default(key: str) -> Any:
    """The schema's default of a dotted key; None for a key that it does not know."""
    table, value = RunConfig, None
    for name in key.split("."):
        field = table.model_fields.get(name) if table else None
        if field is None:
            return None
        value, table = field.get_default(call_default_factory=True), table_of(field.annotation)
    return None if value is PydanticUndefined else value


def report_resume(
    checkpoint: Checkpoint, record: Mapping[str, Any], progress: Progress, order: EpochOrder, schedule: Schedule, rate: float
) -> None:
    """Log where the run goes on, with what learning rate, and what follows from that which changed."""
    _report_changes(checkpoint, record)
    _report_batch(checkpoint, progress, order, schedule)
    written_by = checkpoint.manifest["written_by"]
    log.info(
        "continuing from step %d (epoch %d) of %s, written by %d stage(s) x %d replica(s), to step %d; learning rate %g",
        progress.step,
        progress.epoch + 1,
        checkpoint.folder.name,
        written_by["stages"],
        written_by["replicas"],
        schedule.total_steps,
        rate,
    )


def _report_changes(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Log what is other than when the checkpoint was written.  A setting that is new, with its default, is no change."""
    before, now = checkpoint.record, json.loads(json.dumps(record))
    for key, old, new in differences(before["settings"], now["settings"]):
        if old is not None or new != _default(key):
            log.warning("changed since the checkpoint: %s", _change(key, old, new))
    if before.get("data") != now["data"]:
        log.warning("the data set is not the one of the checkpoint: the rest of the epoch has another order")


def _report_batch(checkpoint: Checkpoint, progress: Progress, order: EpochOrder, schedule: Schedule) -> None:
    """Log whether the steps are the same ones on this many GPUs, and if not, what follows from it."""
    settings = checkpoint.record["settings"]
    was_order = EpochOrder(order.samples, BatchSizes.of(settings, order.sizes.rules), order.seed)
    before, now = GlobalBatch.of(was_order, settings, checkpoint.manifest["written_by"]["replicas"]), schedule.batch
    same_sizes = was_order.batch_sizes == order.batch_sizes
    if not same_sizes:
        log.warning(
            "a micro-batch had %s samples, has %s: samples are put together in another way, so some samples of epoch %d are "
            "shown twice and some not; later epochs show each as before",
            *_sizes(was_order, order),
            progress.epoch + 1,
        )
    elif before != now and before.micro_batches == now.micro_batches:
        log.info("the global batch stays %s: the same samples and noise, only rounding differs", now)
    if before.samples and now.samples:
        changed, kept, rest = before.samples != now.samples, *divmod(before.samples, now.samples // now.accumulation)
    else:
        changed, kept, rest = before.micro_batches != now.micro_batches, *divmod(before.micro_batches, now.replicas)
    if changed:
        epoch = order.next_epoch(progress.epoch + 1)
        log.warning(
            "the global batch was %s, is %s%s. Steps count as before: from step %d, sample %d of epoch %d, on an epoch has %d "
            "steps instead of %d, and the run ends after step %d. Warm-up, schedule, and what is done every n steps go by steps",
            before,
            now,
            "" if rest else f"; gradient_accumulation_steps = {kept} would keep it",
            progress.step,
            progress.epoch_samples,
            progress.epoch + 1,
            order.num_steps(epoch, now.micro_batches),
            was_order.num_steps(epoch, before.micro_batches),
            schedule.total_steps,
        )


def _sizes(was: EpochOrder, now: EpochOrder) -> tuple[str, str]:
    """The sizes of micro-batches before and now: ``2`` where all are the same, else those of the buckets that have changed."""
    found = (was.batch_sizes, now.batch_sizes)
    if all(len(set(sizes.values())) == 1 for sizes in found):
        return str(next(iter(found[0].values()))), str(next(iter(found[1].values())))
    changed = [bucket for bucket, size in found[0].items() if size != found[1][bucket]]
    named = changed[:NAMED_BUCKETS]
    more = ", …" if len(changed) > len(named) else ""
    before, after = (", ".join(f"{sizes[bucket]} of {bucket}" for bucket in named) + more for sizes in found)
    return before, after
