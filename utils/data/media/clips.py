"""Clips, read with PyAV (its wheel carries its own ffmpeg): when their frames are shown, and the frames as they are displayed."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from utils.data.media.files import DataFile, MediaError, opened, tell_once
from utils.data.media.pictures import refuse_if_huge
from utils.data.media.resampling import Timeline

log = logging.getLogger(__name__)

# AVI has no presentation times: with B-frames ffmpeg reports times in the order of decoding.  Its frames are counted instead.
_UNTIMED_FORMATS = frozenset({"avi"})

# Streams that ffmpeg calls video and that are pictures beside sound or beside the film.
_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image

# A display matrix (a, b, c, d) sends a stored pixel (x, y) to (ax + cy, bx + dy), y downwards.  What undoes the storage:
_UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # a clockwise quarter turn; Pillow counts the other way round
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class ClipLook:
    """What is known of a clip without its frames."""

    timeline: Timeline
    pixel_aspect: Fraction
    """Width of a pixel over its height."""


def look_at_clip(file: DataFile) -> ClipLook:
    """Read all packets without decoding them.  The frame count in a header may be missing, or promise more than the file holds.

    A clip is looked at once by each process, as long as it does not change: of a long one many parts may be loaded.
    """
    try:
        state = file.path.stat()
    except OSError:
        return _look_at_clip.__wrapped__(file, 0, 0)  # where the error is told
    return _look_at_clip(file, state.st_size, state.st_mtime_ns)


def forget_looks() -> None:
    """As in a new process; for measurements."""
    _look_at_clip.cache_clear()


@lru_cache(maxsize=4096)
def _look_at_clip(file: DataFile, size: int, mtime_ns: int) -> ClipLook:
    with _container(file) as (container, stream):
        frames, first, last, untimed = 0, None, None, container.format.name in _UNTIMED_FORMATS
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the end marker; frames that an edit list hides
                continue
            frames += 1
            if packet.is_corrupt:
                raise MediaError(file, f"it is cut off or damaged: frame {frames} is not whole")
            if packet.pts is None:
                untimed = True
            elif first is None:
                first = last = packet.pts
            else:
                first, last = min(first, packet.pts), max(last, packet.pts)
        if not frames:
            raise MediaError(file, "it has no frames")
        pixel_aspect, rate = stream.sample_aspect_ratio or Fraction(1), stream.average_rate
        promised = container.duration / av.time_base if container.duration else 0.0
        if not untimed:
            timeline = Timeline(frames, first * stream.time_base, last * stream.time_base)
        elif rate:
            timeline = Timeline(frames, Fraction(0), (frames - 1) / rate, rate)
        else:
            raise MediaError(file, "its frames have neither times nor a rate; convert it to mp4")
    if max(timeline.span, timeline.end) + 1 < promised * 0.9:
        told = f"it lasts {promised:.1f} s, and its frames end after {float(timeline.span):.1f} s; these are used"
        tell_once(log, f"{file}: its head says that {told}")
    return ClipLook(timeline, pixel_aspect)


def clip_size(file: DataFile, look: ClipLook) -> tuple[int, int]:
    """(width, height) as displayed, of its first frame."""
    with _container(file) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(file, "no frame of it decodes")
        return upright(first, look).size


def clip_frames(file: DataFile, look: ClipLook, start: Fraction) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames with their times in seconds, as they are shown, from one at or before ``start`` on."""
    seek = look.timeline.rate is None and start > look.timeline.start
    return _decoded(file, look, start, seek)


def _decoded(file: DataFile, look: ClipLook, start: Fraction, seek: bool) -> Iterator[tuple[Fraction, VideoFrame]]:
    rate = look.timeline.rate
    with _container(file) as (container, stream):
        if seek:
            container.seek(int(start / stream.time_base), stream=stream)
        for index, frame in enumerate(container.decode(stream)):
            if frame.pts is None and rate is None:
                raise MediaError(file, "a frame has no time; convert it to mp4")
            time = index / rate if rate else frame.pts * stream.time_base
            if seek and index == 0 and time > start:  # some formats are found behind the time asked for
                yield from _decoded(file, look, start, seek=False)
                return
            yield time, frame


@contextmanager
def _container(file: DataFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its picture stream; ffmpeg's errors in the block become MediaErrors."""
    with opened(file, "clip") as (stream, _):
        try:
            # A file on the disk ffmpeg opens itself; without "file:", what is before a colon in its name would be a protocol.
            with av.open(stream if file.member else f"file:{file.path}") as container:
                streams = [found for found in container.streams.video if not found.disposition & _STILLS]
                if not streams:
                    stills = ", only a cover picture" if container.streams.video else ""
                    raise MediaError(file, f"it has no video stream{stills}")
                refuse_if_huge(file, (streams[0].width, streams[0].height))
                streams[0].codec_context.thread_count = 1  # clips are decoded side by side
                yield container, streams[0]
        except (av.error.FileNotFoundError, av.error.PermissionError) as error:
            raise MediaError(file, f"it cannot be read ({error.strerror})") from error
        except av.error.FFmpegError as error:
            raise MediaError(file, f"it does not decode ({error.strerror}): it is cut off, damaged, or no clip") from error


def upright(frame: VideoFrame, look: ClipLook) -> Image.Image:
    """The frame as it is displayed: RGB, or RGBA if it has transparency; with square pixels, turned and mirrored as it asks."""
    mode = "RGBA" if any(component.is_alpha for component in frame.format.components) else "RGB"
    # Several threads for one frame cost more than they give, and there are as many clips as threads.
    plane = frame.reformat(format={"RGB": "rgb24", "RGBA": "rgba"}[mode], threads=1).planes[0]
    image = Image.frombuffer(mode, (frame.width, frame.height), plane, "raw", mode, plane.line_size, 1)
    if look.pixel_aspect != 1:
        image = image.resize((round(image.width * look.pixel_aspect), image.height), Image.Resampling.LANCZOS)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # 3 x 3 in row order; only its left columns turn.  PyAV's ``rotation`` knows no mirroring, and its sign has changed.
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    turn = _UPRIGHT.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)))
    return image.transpose(turn) if turn is not None else image
