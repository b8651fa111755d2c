"""What encoders are given, read from the files ahead of them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from utils.data.cache.keys import Input, known_frames, num_pixels
from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.media.files import DataFile, content_of
from utils.data.media.pixels import MediaError, load_alpha_mask, load_mask, load_pixels
from utils.data.values import Control, Sample

DECODE_THREADS = 4
DECODED_BYTES_AHEAD = 1 << 30
"""Pixels that may wait for the encoder, beside the ones it works on."""
CHANGED = "it has changed since the run looked at it; start again, and if this comes again, touch it: its time of change was kept"

Work = tuple[str, Input]
"""An input with its key."""


class ItemReader:
    """Makes inputs into items, in threads, and sees to it that files are still those that the keys were made of."""

    def __init__(self):
        self._known: dict[tuple[DataFile, str], tuple[int, int]] = {}
        """Size and time of change of files that were found to have this content."""

    def ahead(self, pieces: Iterator[list[Work]], encoder: ConditionEncoder) -> Iterator[tuple[Work, EncodeItem | MediaError]]:
        """The work in its order, each with what the encoder reads or why there is none.

        While the encoder is busy one piece more is read, or as much of it as ``DECODED_BYTES_AHEAD`` holds.  No further piece is
        taken: another rank may be free before this one.
        """
        todo: deque[Work] = deque()
        waiting: deque[tuple[Work, int, Future[EncodeItem]]] = deque()
        size = 0

        def fill() -> None:
            nonlocal size
            while not waiting or sum(nbytes for _, nbytes, _ in waiting) < DECODED_BYTES_AHEAD:
                if not todo and (not waiting or len(waiting) < size):
                    todo.extend(next(pieces, ()))
                    size = len(todo)
                if not todo:
                    return
                entry = todo.popleft()
                nbytes = 12 * num_pixels(entry[1].sample, encoder)
                waiting.append((entry, nbytes, pool.submit(self.item, entry[1], encoder)))

        pool = ThreadPoolExecutor(DECODE_THREADS)
        try:
            fill()
            while waiting:
                entry, _, future = waiting.popleft()
                fill()
                try:
                    yield entry, future.result()
                except MediaError as error:
                    yield entry, error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def item(self, entry: Input, encoder: ConditionEncoder) -> EncodeItem:
        """Raises MediaError with the file that does not decode, or is not what it was when the run looked at it."""
        sample, reads = entry.sample, encoder.reads
        whole = Control(sample.file, sample.content)
        known = known_frames(sample, encoder)
        files = [control for _, control in known]
        files += [whole] if "pixels" in reads else []
        files += sample.controls if "controls" in reads else []
        files += [sample.mask or whole] if reads == "mask" else []
        with self._unchanged(files):
            return EncodeItem(
                sample.key,
                caption=entry.caption if "caption" in reads else None,
                pixels=_pixels(sample, encoder.max_frames) if "pixels" in reads else None,
                controls=tuple(_picture(control, sample) for control in sample.controls) if "controls" in reads else (),
                original_size=sample.original_size,
                framing=sample.framing,
                known_frames={name: _picture(control, sample) for name, control in known},
                mask=_mask(sample) if reads == "mask" else None,
            )

    @contextmanager
    def _unchanged(self, files: list[Control]) -> Iterator[None]:
        """What is read within is what the samples' keys were made of."""
        stamps = [self._stamp(file) for file in files]
        try:
            yield
        finally:
            # Also when it did not decode: then the change is the reason.
            for file, stamp in zip(files, stamps, strict=True):
                if _stamp(file.file) != stamp:
                    raise MediaError(file.file, CHANGED)

    def _stamp(self, file: Control) -> tuple[int, int]:
        stamp = _stamp(file.file)
        if self._known.get((file.file, file.content)) != stamp:
            try:
                content = content_of(file.file)
            except OSError as error:
                raise _unreadable(file.file, error) from error
            if content != file.content:
                raise MediaError(file.file, CHANGED)
            self._known[file.file, file.content] = stamp
        return stamp


def _stamp(file: DataFile) -> tuple[int, int]:
    try:
        state = file.path.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return state.st_size, state.st_mtime_ns


def _unreadable(file: DataFile, error: OSError) -> MediaError:
    return MediaError(file, f"it cannot be read any more ({error.strerror or error})")


def _pixels(sample: Sample, max_frames: int | None) -> Tensor:
    return load_pixels(sample.file, sample.bucket, sample.fps, sample.first_frame, max_frames, sample.framing, sample.reading)


def _picture(control: Control, sample: Sample) -> Tensor:
    """A picture that belongs to a sample: scaled and cropped as the sample is."""
    size, still = replace(sample.bucket, frames=1), replace(sample.reading, animated="first_frame")
    return load_pixels(control.file, size, framing=sample.framing, reading=still, item_size=sample.original_size)


def _mask(sample: Sample) -> Tensor:
    how = (sample.bucket, sample.fps, sample.first_frame, sample.framing, sample.reading)
    if sample.mask is None:
        return load_alpha_mask(sample.file, *how)
    return load_mask(sample.mask.file, *how, item_size=sample.original_size)
