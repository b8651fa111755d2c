"""What frozen encoders make of a data set, computed once and kept by content.

An item's key is the hash of what goes into the encoder: the file's bytes with the bucket and how frames are chosen, or the
caption's text.  It lies in the folder of the encoder and its fingerprint.  So changing one caption encodes one caption anew,
another text encoder never meets stale outputs, and runs may share a cache.  Every rank encodes its share and writes shards of its
own; ranks meet only by looking at the folder, so nothing times out while they work.
"""

import hashlib
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.files import DataFile
from utils.data.media import PIXELS_VERSION, MediaError, load_pixels
from utils.data.progress import ProgressLog
from utils.data.shards import ShardFolder, ShardWriter, tensor_name
from utils.data.values import Bucket, Sample
from utils.data.variants import alternatives
from utils.errors import UserError, listed

log = logging.getLogger(__name__)

DECODE_THREADS = 4
DECODED_BYTES_AHEAD = 1 << 30
"""Pixels that may wait for the encoder, beside the ones it works on."""
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
        rank: int,
        world_size: int,
        device: torch.device,
        batch_size: int = 1,
        stop: Callable[[], bool] = lambda: False,
        poll_seconds: float = 2.0,
        stall_timeout: float = 1800.0,
    ) -> BuildReport:
        """Encode this rank's share of what is missing, and wait until the other ranks have written theirs.

        ``batch_size``: items of one shape that an encoder gets at once.  ``stop`` is looked at between batches and while waiting;
        once it says True, what was encoded is written and the report is incomplete.
        Raises UserError with all files that did not decode, after everything else of the share is done; and if nothing new
        appeared for ``stall_timeout`` seconds while waiting for the other ranks.
        """
        reports: list[EncoderReport] = []
        broken: dict[DataFile, MediaError] = {}
        wanted = {encoder: inputs_of(samples, encoder) for encoder in encoders}
        for encoder, inputs in wanted.items():
            missing = self._missing(encoder, inputs)
            share = [(key, inputs[key]) for key in share_of(inputs, encoder, rank, world_size) if key in missing]
            encoded = self._encode(encoder, share, device, batch_size, stop, broken) if share and not stop() else 0
            reports.append(EncoderReport(encoder.name, len(inputs), len(inputs) - len(missing), encoded))
        if broken:
            raise UserError(listed([str(error) for error in broken.values()], "these files do not decode; repair or remove them:"))
        return BuildReport(reports, complete=self._wait(wanted, stop, poll_seconds, stall_timeout))

    def _encode(
        self,
        encoder: ConditionEncoder,
        work: list[tuple[str, Sample]],
        device: torch.device,
        batch_size: int,
        stop: Callable[[], bool],
        broken: dict[DataFile, MediaError],
    ) -> int:
        """Encode and write; returns how many.  Files that do not decode are added to ``broken``."""
        log.info("%s: %d to encode", encoder.name, len(work))
        writer = ShardWriter(self._shards(encoder).folder, **self._shard_limits)
        progress = ProgressLog(f"encoding with {encoder.name}", len(work))
        encoded = 0
        encoder.load(device)
        try:
            for batch in _batches_ahead(encoder, work, batch_size, broken):
                if stop():
                    break
                outputs = encoder.encode([item for _, item in batch])
                for (key, _), fields in zip(batch, outputs, strict=True):
                    writer.add(key, fields)
                encoded += len(batch)
                progress.report(encoded)
        finally:
            # Also when the encoder failed: what it has made is kept.
            try:
                writer.flush()
            finally:
                encoder.unload()
        return encoded

    def _wait(
        self,
        wanted: dict[ConditionEncoder, dict[str, Sample]],
        stop: Callable[[], bool],
        poll_seconds: float,
        stall_timeout: float,
    ) -> bool:
        """Look at the folder until everything is there; False if asked to stop before."""
        total = sum(len(inputs) for inputs in wanted.values())
        progress = ProgressLog("waiting for the other ranks to encode", total)
        before, since = total + 1, time.monotonic()
        while missing := sum(len(self._missing(encoder, inputs)) for encoder, inputs in wanted.items()):
            if stop():
                return False
            if missing < before:
                before, since = missing, time.monotonic()
            elif time.monotonic() - since > stall_timeout:
                raise UserError(
                    f"{missing} of {total} encoded items are missing in {self.folder}, and no other rank has written one for "
                    f"{stall_timeout / 60:g} minutes; look for an error in the other ranks' output, and check that all of them see "
                    "this folder. Start again to continue: what is encoded is kept"
                )
            progress.report(total - missing)
            time.sleep(poll_seconds)
        return True

    def _shards(self, encoder: ConditionEncoder) -> ShardFolder:
        if encoder not in self._folders:
            self._folders[encoder] = ShardFolder(self.folder / encoder.name / _digest(encoder.fingerprint()))
        return self._folders[encoder]

    def _missing(self, encoder: ConditionEncoder, inputs: Iterable[str]) -> set[str]:
        """Those of the keys that no shard holds at this moment."""
        shards = self._shards(encoder)
        shards.refresh()
        return {key for key in inputs if key not in shards.places}

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, sample: Sample, encoders: Sequence[ConditionEncoder]) -> dict[str, Tensor]:
        """The outputs of all encoders for a sample with its ``caption``, by field.  May be called from several threads.

        Raises UserError if something is missing or cannot be read.
        """
        merged: dict[str, Tensor] = {}
        for encoder in encoders:
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


def input_key(sample: Sample, encoder: ConditionEncoder) -> str:
    """Hash of what the encoder sees of a sample."""
    parts: list[object] = []
    if "caption" in encoder.reads:
        parts += ["caption", sample.caption]
    if "pixels" in encoder.reads:
        # A picture has neither a rate nor a part to choose.  Which frame of a clip is the first depends on the bucket's length.
        frames = (sample.fps, sample.first_frame) if sample.fps is not None else ()
        parts += ["pixels", PIXELS_VERSION, sample.content, sample.bucket, *frames]
    if "controls" in encoder.reads:
        size = (sample.bucket.width, sample.bucket.height)
        parts += ["controls", PIXELS_VERSION, *size, *(control.content for control in sample.controls)]
    return _digest(*parts)


def inputs_of(samples: Sequence[Sample], encoder: ConditionEncoder) -> dict[str, Sample]:
    """The different inputs of an encoder by their keys, each with the first sample that has it, captioned as it is encoded."""
    inputs: dict[str, Sample] = {}
    for sample in samples:
        for captioned in alternatives(sample) if "caption" in encoder.reads else [sample]:
            inputs.setdefault(input_key(captioned, encoder), captioned)
    return inputs


def share_of(inputs: dict[str, Sample], encoder: ConditionEncoder, rank: int, world_size: int) -> list[str]:
    """The keys that are this rank's to encode, those of one bucket together.

    Each key, the largest first, goes to the rank that has the fewest pixels so far.  What is in the cache already plays no part:
    ranks that look at it at different moments must agree on who does what.
    """
    costs = {key: 1 + _num_pixels(sample, encoder) for key, sample in inputs.items()}
    loads = [(0, owner) for owner in range(world_size)]
    share = []
    for key in sorted(inputs, key=lambda key: (-costs[key], key)):
        load, owner = loads[0]
        heapq.heapreplace(loads, (load + costs[key], owner))
        if owner == rank:
            share.append(key)
    return sorted(share, key=lambda key: (inputs[key].bucket, key))


def _batches_ahead(
    encoder: ConditionEncoder, work: list[tuple[str, Sample]], batch_size: int, broken: dict[DataFile, MediaError]
) -> Iterator[list[tuple[str, EncodeItem]]]:
    """The work in batches, of pixels those of one bucket together, read by threads ahead of the encoder."""
    batch: list[tuple[str, EncodeItem]] = []
    shape: Bucket | None = None
    for key, sample, item in _items_ahead(encoder, work, broken):
        item_shape = None if encoder.reads == "caption" else sample.bucket
        if batch and (len(batch) == batch_size or item_shape != shape):
            yield batch
            batch = []
        batch.append((key, item))
        shape = item_shape
    if batch:
        yield batch


def _items_ahead(
    encoder: ConditionEncoder, work: list[tuple[str, Sample]], broken: dict[DataFile, MediaError]
) -> Iterator[tuple[str, Sample, EncodeItem]]:
    """The work in its order, with what the encoder reads; bounded in memory, and without the files that do not decode."""
    waiting: deque[tuple[str, Sample, int, Future[EncodeItem]]] = deque()
    waiting_bytes = 0
    todo = deque(work)
    pool = ThreadPoolExecutor(DECODE_THREADS)
    try:
        while todo or waiting:
            while todo and (not waiting or (len(waiting) < 4 * DECODE_THREADS and waiting_bytes < DECODED_BYTES_AHEAD)):
                key, sample = todo.popleft()
                nbytes = 12 * _num_pixels(sample, encoder)
                waiting.append((key, sample, nbytes, pool.submit(_item, sample, encoder)))
                waiting_bytes += nbytes
            key, sample, nbytes, future = waiting.popleft()
            waiting_bytes -= nbytes
            try:
                yield key, sample, future.result()
            except MediaError as error:
                broken[error.file] = error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _num_pixels(sample: Sample, encoder: ConditionEncoder) -> int:
    """What of a sample is decoded for the encoder."""
    frames = min(sample.bucket.frames, encoder.max_frames or sample.bucket.frames)
    pictures = frames * ("pixels" in encoder.reads) + len(sample.controls) * ("controls" in encoder.reads)
    return sample.bucket.width * sample.bucket.height * pictures


def _item(sample: Sample, encoder: ConditionEncoder) -> EncodeItem:
    picture = replace(sample.bucket, frames=1)
    return EncodeItem(
        sample.key,
        caption=sample.caption if "caption" in encoder.reads else None,
        pixels=load_pixels(sample.file, sample.bucket, sample.fps, sample.first_frame, encoder.max_frames)
        if "pixels" in encoder.reads
        else None,
        controls=tuple(load_pixels(control.file, picture) for control in sample.controls) if "controls" in encoder.reads else (),
        original_size=sample.original_size,
    )


def _digest(*parts: object) -> str:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()
