"""Clips, read with PyAV (its wheel carries its own ffmpeg): when their frames are shown, and the frames as they are displayed."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from utils.data.files import DataFile, MediaError, opened, tell_once
from utils.data.pictures import refuse_if_huge
from utils.data.resampling import Timeline

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
    """Read all packets without decoding them.  The frame count in a header may be missing, or promise more than the file holds."""
    with _container(file) as (container, stream):
        stamps: list[int | None] = []
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the end marker; frames that an edit list hides
                continue
            if packet.is_corrupt:
                raise MediaError(file, f"it is cut off or damaged: frame {len(stamps) + 1} is not whole")
            stamps.append(packet.pts)
        if not stamps:
            raise MediaError(file, "it has no frames")
        promised = container.duration / av.time_base if container.duration else 0.0
        pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        known = [stamp for stamp in stamps if stamp is not None]
        if len(known) == len(stamps) and container.format.name not in _UNTIMED_FORMATS:
            timeline = Timeline(tuple(stamp * stream.time_base for stamp in sorted(known)))
        elif stream.average_rate:
            times = tuple(index / stream.average_rate for index in range(len(stamps)))
            timeline = Timeline(times, stream.average_rate)
        else:
            raise MediaError(file, "its frames have neither times nor a rate; convert it to mp4")
    if max(timeline.span, timeline.times[-1]) + 1 < promised * 0.9:
        tell_once(
            log,
            f"{file}: its head says that it lasts {promised:.1f} s, and its frames end after {float(timeline.span):.1f} s; "
            "these are used",
        )
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
    seek = look.timeline.rate is None and start > look.timeline.times[0]
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
                yield container, streams[0]
        except av.error.FFmpegError as error:
            raise MediaError(file, f"it does not decode ({error.strerror}): it is cut off, damaged, or no clip") from error


def upright(frame: VideoFrame, look: ClipLook) -> Image.Image:
    """The frame as it is displayed: RGB, or RGBA if it has transparency; with square pixels, turned and mirrored as it asks."""
    if any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_image()
    if look.pixel_aspect != 1:
        image = image.resize((round(image.width * look.pixel_aspect), image.height), Image.Resampling.LANCZOS)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # 3 x 3 in row order; only its left columns turn.  PyAV's ``rotation`` knows no mirroring, and its sign has changed.
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    turn = _UPRIGHT.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)))
    return image.transpose(turn) if turn is not None else image
