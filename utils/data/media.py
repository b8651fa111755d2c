"""Pictures and clips: how large and how long they are, and their pixels as a model sees them.

Clips are read with PyAV (its wheel carries its own ffmpeg), pictures with Pillow.  Both are turned upright first.
"""

import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps
from torch import Tensor

from utils.data.files import DataFile
from utils.data.values import AS_IT_IS, CENTRE, Bucket, Framing, Reading
from utils.errors import UserError

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
CLIPS = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".gif"})

PIXELS_VERSION = 1
"""Part of the cache key of everything that is made of pixels: raise it when :func:`load_pixels` gives other values."""

# AVI has no presentation times: with B-frames ffmpeg reports times in the order of decoding.  Its frames are counted instead.
_UNTIMED_FORMATS = frozenset({"avi"})

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


class MediaError(UserError):
    """A file that cannot be used, and why."""

    def __init__(self, file: DataFile, reason: str):
        super().__init__(file, reason)  # both arguments, so that the error survives pickling
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@dataclass(frozen=True)
class Covering:
    """The size that a picture is scaled to, and the left upper corner of what is cut out of that, in pixels."""

    width: int
    height: int
    left: int
    top: int


def covering(size: tuple[int, int], target: tuple[int, int]) -> Covering:
    """How a picture of ``size`` just covers ``target``, with its centre; both (width, height)."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))
    return Covering(width, height, (width - target[0]) // 2, (height - target[1]) // 2)


@dataclass(frozen=True)
class MediaInfo:
    """Size in pixels as displayed (turned upright, square pixels), and length."""

    width: int
    height: int
    frames: int
    """Frames that are there; 1 for a picture."""
    fps: float | None
    """Mean rate between the first and the last frame; None for a picture."""


def is_clip(file: DataFile) -> bool:
    """By its name: only files of the suffixes above are looked at."""
    return file.suffix in CLIPS


def probe(file: DataFile) -> MediaInfo:
    """Size and length of a file.  Decodes a picture whole, and of a clip the first frame; its frames are counted, not believed.

    Raises MediaError if the file is empty, cut off, or not what its name says.
    """
    if not is_clip(file):
        width, height = _picture(file).size
        return MediaInfo(width, height, frames=1, fps=None)
    with _opened(file) as (container, stream):
        timeline = _timeline(file, container, stream)
    with _opened(file) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(file, "no frame of it decodes")
        width, height = _upright(first, timeline.pixel_aspect).size
    return MediaInfo(width, height, frames=len(timeline.times), fps=float(timeline.fps))


def load_pixels(
    file: DataFile,
    bucket: Bucket,
    fps: float | None = None,
    first_frame: int = 0,
    max_frames: int | None = None,
    framing: Framing = CENTRE,
    reading: Reading = AS_IT_IS,
) -> Tensor:
    """The pixels of one sample: fp32 [3, frames, height, width] in [-1, 1]; with ``max_frames`` the first ones of them.

    Frame ``i`` of a clip is the source frame nearest to ``(first_frame + i) / fps`` seconds after the clip's first one (of two
    equally near, the earlier).  Each frame is scaled (Lanczos) so that it just covers the bucket, and cropped to its centre.
    Raises MediaError if the frames that are needed do not decode.
    """
    if is_clip(file):
        assert fps, "a clip needs a frame rate"
        frames = _clip_frames(file, bucket, fps, first_frame, max_frames)
    else:
        frames = [_fitted(_picture(file), bucket)]
    pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def frames_at(info: MediaInfo, fps: float) -> int:
    """How many frames a clip has when resampled to ``fps``: as long as the last one has a source frame that is nearest to it."""
    assert info.fps, "a picture has no frame rate"
    return math.floor((info.frames - 0.5) * fps / info.fps) + 1


@contextmanager
def _bytes_of(file: DataFile) -> Iterator[BinaryIO]:
    try:
        with file.open() as stream:
            if not stream.read(1):
                raise MediaError(file, "the file is empty")
            stream.seek(0)
            yield stream
    except OSError as error:
        raise MediaError(file, f"it cannot be read ({error.strerror or error})") from error


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _picture(file: DataFile) -> Image.Image:
    """The decoded picture, upright, RGB; transparent parts become white."""
    with _bytes_of(file) as stream:
        try:
            with Image.open(stream) as opened:
                image = ImageOps.exif_transpose(opened)
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
            raise MediaError(file, f"it does not decode as a picture ({type(error).__name__}: {error})") from error
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise MediaError(file, f"pixels of type {image.mode} have no known range; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _fitted(image: Image.Image, bucket: Bucket) -> np.ndarray:
    """uint8 [height, width, 3]: the centre of the picture scaled to just cover the bucket."""
    cover = covering(image.size, (bucket.width, bucket.height))
    scaled = image.resize((cover.width, cover.height), Image.Resampling.LANCZOS)
    return np.asarray(scaled.crop((cover.left, cover.top, cover.left + bucket.width, cover.top + bucket.height)))


# ── clips ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Timeline:
    """When a clip's frames are shown, and how wide its pixels are."""

    times: list[Fraction]
    """Rising, in seconds."""
    rate: Fraction | None
    """For frames without times of their own: the rate at which they are counted.  None: frames tell their time."""
    pixel_aspect: Fraction
    """Width of a pixel over its height."""

    @property
    def span(self) -> Fraction:
        """Seconds from the first to the last frame."""
        return self.times[-1] - self.times[0]

    @property
    def fps(self) -> Fraction:
        return (len(self.times) - 1) / self.span if self.span else self.rate or Fraction(1)


@contextmanager
def _opened(file: DataFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its picture stream; ffmpeg's errors in the block become MediaErrors."""
    try:
        # Of a file on the disk ffmpeg is told the name, which helps it to know the format.
        with _bytes_of(file) as stream, av.open(stream if file.member else str(file.path)) as container:
            if not container.streams.video:
                raise MediaError(file, "it has no video stream")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        raise MediaError(file, f"it does not decode ({error.strerror}): it is cut off, damaged, or no clip") from error


def _timeline(file: DataFile, container: InputContainer, stream: VideoStream) -> _Timeline:
    """Read all packets without decoding them.  The frame count in a header may be missing, or promise more than the file holds."""
    stamps: list[int | None] = []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:  # the end marker; frames that an edit list hides
            continue
        if packet.is_corrupt:
            raise MediaError(file, f"it is cut off or damaged: frame {len(stamps) + 1} is not whole")
        stamps.append(packet.pts)
    if not stamps:
        raise MediaError(file, "it has no frames")
    pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(stamps) and container.format.name not in _UNTIMED_FORMATS:
        return _Timeline([stamp * stream.time_base for stamp in sorted(known)], None, pixel_aspect)
    if not stream.average_rate:
        raise MediaError(file, "its frames have neither times nor a rate; convert it to mp4")
    return _Timeline([index / stream.average_rate for index in range(len(stamps))], stream.average_rate, pixel_aspect)


def _decoded(file: DataFile, timeline: _Timeline, start: Fraction, seek: bool) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames with their times in seconds, as they are shown; with ``seek``, from a key frame at or before ``start``."""
    with _opened(file) as (container, stream):
        if seek:
            container.seek(int(start / stream.time_base), stream=stream)
        for index, frame in enumerate(container.decode(stream)):
            if frame.pts is None and timeline.rate is None:
                raise MediaError(file, "a frame has no time; convert it to mp4")
            time = index / timeline.rate if timeline.rate else frame.pts * stream.time_base
            if seek and index == 0 and time > start:  # some formats are found behind the time asked for
                yield from _decoded(file, timeline, start, seek=False)
                return
            yield time, frame


def _nearest(frames: Iterable[tuple[Fraction, VideoFrame]], targets: list[Fraction], tolerance: Fraction) -> Iterator[VideoFrame]:
    """For each target the frame nearest in time, of two equally near the earlier; ends where no frame is within ``tolerance``."""
    waiting = deque(targets)
    before: tuple[Fraction, VideoFrame] | None = None
    for time, frame in frames:
        while waiting and waiting[0] <= time:
            target = waiting.popleft()
            yield before[1] if before and target - before[0] <= time - target else frame
        if not waiting:
            return
        before = (time, frame)
    while waiting and before and waiting.popleft() - before[0] <= tolerance:
        yield before[1]


def _clip_frames(file: DataFile, bucket: Bucket, fps: float, first_frame: int, max_frames: int | None) -> list[np.ndarray]:
    """The clip's frames for a bucket, each uint8 [height, width, 3]; decoding ends with the last frame that is needed."""
    with _opened(file) as (container, stream):
        timeline = _timeline(file, container, stream)
    step = 1 / Fraction(fps)
    start = timeline.times[0] + first_frame * step
    targets = [start + index * step for index in range(bucket.frames)][:max_frames]
    decoded = _decoded(file, timeline, start, seek=timeline.rate is None and first_frame > 0)

    fitted: list[np.ndarray] = []
    latest: VideoFrame | None = None
    for frame in _nearest(decoded, targets, tolerance=1 / timeline.fps):
        if frame.is_corrupt:
            raise MediaError(file, f"frame {len(fitted) + 1} of the {len(targets)} that are needed is damaged")
        fitted.append(fitted[-1] if frame is latest else _fitted(_upright(frame, timeline.pixel_aspect), bucket))
        latest = frame
    if len(fitted) < len(targets):
        raise MediaError(file, f"only {len(fitted)} of the {len(targets)} frames that are needed decode")
    return fitted


def _upright(frame: VideoFrame, pixel_aspect: Fraction) -> Image.Image:
    """The frame as it is displayed: RGB, with square pixels, turned and mirrored as the file asks."""
    image = frame.to_image()
    if pixel_aspect != 1:
        image = image.resize((round(image.width * pixel_aspect), image.height), Image.Resampling.LANCZOS)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # 3 x 3 in row order; only its left columns turn.  PyAV's ``rotation`` knows no mirroring, and its sign has changed.
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    turn = _UPRIGHT.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)))
    return image.transpose(turn) if turn is not None else image
