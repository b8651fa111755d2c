"""The cache of a data set: encoding what is missing, and reading what is there."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.data.cache.encoding import RankEncoding
from utils.data.cache.keys import Input, input_key, inputs_of, keys_of
from utils.data.cache.shards import ShardFolder, ShardWriter, tensor_name
from utils.data.cache.sharing import Broken, Plan, Team, divided
from utils.data.encoders import ConditionEncoder
from utils.data.masks import has_mask
from utils.data.progress import ProgressLog
from utils.data.values import Sample
from utils.errors import UserError, listed
from utils.topology import Topology

log = logging.getLogger(__name__)

OPEN_SHARDS = 256
"""Shards that stay mapped to memory for reading."""


@dataclass(frozen=True)
class EncoderReport:
    """What one encoder had to do."""

    name: str
    total: int
    """Different inputs in the data set."""
    found: int
    """Of these, in the cache at the start."""
    encoded: int
    """Encoded by this rank."""


@dataclass(frozen=True)
class BuildReport:
    encoders: list[EncoderReport]
    complete: bool
    """False if the run was asked to stop before everything was encoded."""
    unusable: dict[Sample, str] = field(default_factory=dict)
    """Samples of which something could not be encoded, with the file and the reason; the same on all ranks."""

    def lines(self) -> list[str]:
        return [
            f"{part.name}: {part.total} different inputs, {part.found} in the cache, {part.encoded} encoded here"
            for part in self.encoders
        ]


class DatasetCache:
    """The cache in one folder.  ``shard_*``: a shard is written when it holds so much, or its first item has waited so long."""

    def __init__(self, folder: Path, *, shard_items: int = 512, shard_bytes: int = 1 << 28, shard_seconds: float = 20.0):
        self.folder = folder
        self._shard_limits = {"max_items": shard_items, "max_bytes": shard_bytes, "max_seconds": shard_seconds}
        self._folders: dict[ConditionEncoder, ShardFolder] = {}
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: safe_open(shard, "pt"))

    # ── encoding ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def build(
        self,
        samples: Sequence[Sample],
        encoders: Sequence[ConditionEncoder],
        *,
        device: torch.device,
        topology: Topology | None = None,
        batch_size: int = 1,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        stop: Callable[[], bool] = lambda: False,
        poll_seconds: float = 2.0,
        late_seconds: float = 600.0,
    ) -> BuildReport:
        """Encode what is missing, together with the other ranks of the topology; collective.  Without one, alone.

        Rank 0 looks at what is missing.  Then each rank takes a piece whenever it has done one, and waits at the end, by looking,
        until the others are done as well, however long that takes.

        ``batch_size``: items of one shape that an encoder gets at once.  ``stop`` is looked at between batches and while waiting;
        once it says True, what was encoded is written and the report is incomplete.

        Files that do not decode, or are not what they were when the samples were made: with ``on_bad_sample`` "stop" UserError with
        all of them, on all ranks and after everything else is done; with "skip" their samples are ``unusable``.  UserError, too,
        if all ranks are done and what they wrote cannot be seen here for ``late_seconds``.
        """
        wanted = [inputs_of(samples, encoder) for encoder in encoders]
        team = Team(topology)
        plan = team.agree(lambda: self._plan(encoders, wanted, batch_size, team.size))
        rank = RankEncoding(team, device, batch_size, stop)
        encoded = rank.run(encoders, wanted, self._writer) if plan.pieces else [0] * len(encoders)
        reports = [
            EncoderReport(encoder.name, len(inputs), len(inputs) - missing, count)
            for encoder, inputs, missing, count in zip(encoders, wanted, plan.missing, encoded, strict=True)
        ]
        team.leave(rank.broken)
        broken = self._wait_for_all(team, stop, poll_seconds)
        # All ranks or none: one may have been asked to stop already, and another have heard of it only now.
        if not team.all(broken is not None):
            return BuildReport(reports, complete=False)
        if broken and on_bad_sample == "stop":
            raise broken_files(map(str, broken))
        keys = {key: str(each) for each in broken for key in each.keys}
        if not self._wait_for_files(encoders, wanted, set(keys), stop, poll_seconds, late_seconds if team.size > 1 else 0.0):
            return BuildReport(reports, complete=False)
        return BuildReport(reports, complete=True, unusable=_unusable(samples, encoders, keys) if keys else {})

    def _plan(
        self, encoders: Sequence[ConditionEncoder], wanted: Sequence[dict[str, Input]], batch_size: int, world_size: int
    ) -> Plan:
        pieces, numbers = [], []
        for place, (encoder, inputs) in enumerate(zip(encoders, wanted, strict=True)):
            missing = {key: inputs[key] for key in self._missing(encoder, inputs)}
            self._shards(encoder).mark_used(inputs)
            pieces += divided(missing, encoder, place, batch_size, world_size)
            numbers.append(len(missing))
        return Plan(pieces, numbers)

    def _wait_for_all(self, team: Team, stop: Callable[[], bool], poll_seconds: float) -> list[Broken] | None:
        """What was broken for any rank, once all of them are done; None if asked to stop before."""
        progress = ProgressLog("waiting for the other ranks, which encode", sum(team.plan.missing))
        while (broken := team.broken()) is None:
            if stop():
                return None
            progress.report(sum(team.done(place)[0] for place in range(len(team.plan.missing))))
            time.sleep(poll_seconds)
        return broken

    def _wait_for_files(
        self,
        encoders: Sequence[ConditionEncoder],
        wanted: Sequence[dict[str, Input]],
        without: set[str],
        stop: Callable[[], bool],
        poll_seconds: float,
        late_seconds: float,
    ) -> bool:
        """Look at the folder until everything can be seen here; False if asked to stop before."""
        since = time.monotonic()
        while missing := sum(len(self._missing(*pair) - without) for pair in zip(encoders, wanted, strict=True)):
            if stop():
                return False
            if time.monotonic() - since >= late_seconds:
                raise UserError(
                    f"{missing} of {sum(map(len, wanted))} encoded items are missing in {self.folder}, although all ranks are "
                    "done; look for warnings above, and check that all machines see this folder, and in time. "
                    "Start again to continue: what is encoded is kept"
                )
            time.sleep(poll_seconds)
        return True

    def _shards(self, encoder: ConditionEncoder) -> ShardFolder:
        if encoder not in self._folders:
            name = hashlib.blake2b(encoder.fingerprint().encode(), digest_size=16).hexdigest()
            self._folders[encoder] = ShardFolder(self.folder / encoder.name / name)
        return self._folders[encoder]

    def _writer(self, encoder: ConditionEncoder) -> ShardWriter:
        return ShardWriter(self._shards(encoder).folder, **self._shard_limits)

    def _missing(self, encoder: ConditionEncoder, inputs: Iterable[str]) -> set[str]:
        """Those of the keys that no shard holds at this moment."""
        shards = self._shards(encoder)
        shards.refresh()
        return {key for key in inputs if key not in shards.places}

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, sample: Sample, encoders: Sequence[ConditionEncoder]) -> dict[str, Tensor]:
        """The outputs of all encoders for a sample with its ``caption``, by field; ``mask`` only if it has one.

        May be called from several threads, and in forked processes.  Raises UserError if something is missing or cannot be read.
        """
        merged: dict[str, Tensor] = {}
        for encoder in encoders:
            if encoder.reads == "mask" and not has_mask(sample):
                continue
            fields = self._read(sample, encoder)
            assert not merged.keys() & fields.keys(), f"{encoder.name} gives fields that another encoder gives: {sorted(fields)}"
            merged.update(fields)
        return merged

    def _read(self, sample: Sample, encoder: ConditionEncoder) -> dict[str, Tensor]:
        key = input_key(sample, encoder)
        shards = self._shards(encoder)
        if key not in shards.places:
            shards.refresh()
        place = shards.places.get(key)
        if place is None:
            raise UserError(
                f"{sample.key}: {shards.folder} does not hold what {encoder.name} makes of it; start again to encode it"
            )
        try:
            file = self._open(place.shard)
            # Copied out of the mapped file: so the disk is waited for here, by the thread that reads ahead.
            return {name: file.get_tensor(tensor_name(key, name)).clone() for name in place.fields}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{place.shard} cannot be read any more ({error}); start again to encode what it held") from error


SKIP_THEM = 'these files cannot be encoded; repair or remove them, or set on_bad_sample = "skip":'


def broken_files(problems: Iterable[str], heading: str = SKIP_THEM) -> UserError:
    """The error for files that could not be encoded, each once; every rank has the same."""
    error = UserError(listed(sorted(set(problems)), heading))
    error.everywhere = True
    return error


def _unusable(samples: Sequence[Sample], encoders: Sequence[ConditionEncoder], broken: dict[str, str]) -> dict[Sample, str]:
    """The samples of which something is missing, and why."""
    found: dict[Sample, str] = {}
    for sample in samples:
        for encoder in encoders:
            for key in keys_of(sample, encoder):
                if key in broken:
                    found.setdefault(sample, broken[key])
    return found
