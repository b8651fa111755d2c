"""Pictures and clips: how large and how long they are, and their pixels and masks as a model sees them.

``pictures.py`` and ``clips.py`` read them, ``resampling.py`` chooses frames, ``framing.py`` what is cut off.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.media.clips import clip_frames, clip_size, look_at_clip, upright
from utils.data.media.files import DataFile, MediaError
from utils.data.media.framing import Covering, FramingError, covering, cropped_share, enlargement, framing_for
from utils.data.media.pictures import look_at_animation, read_animation, read_picture
from utils.data.media.resampling import Timeline, nearest
from utils.data.values import AS_IT_IS, CENTRE, Bucket, Framing, Reading

__all__ = [
    "CLIPS",
    "PICTURES",
    "PIXELS_VERSION",
    "Covering",
    "MediaError",
    "MediaInfo",
    "covering",
    "cropped_share",
    "enlargement",
    "frames_at",
    "is_clip",
    "load_alpha_mask",
    "load_mask",
    "load_pixels",
    "probe",
]

PICTURES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jfif", ".jp2", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".heic", ".heif"}
)
"""Suffixes of pictures.  Some of them may be animated, and then be taken for clips: ``MediaInfo.fps`` tells."""
CLIPS = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"})

PIXELS_VERSION = 2
"""Part of the cache key of everything that is made of pixels: raise it when :func:`load_pixels` gives other values."""

BLACK = (0, 0, 0)


@dataclass(frozen=True)
class MediaInfo:
    """Size in pixels as displayed (turned upright, square pixels), and length."""

    width: int
    height: int
    frames: int
    """Frames that are there; 1 for a picture."""
    fps: float | None
    """Mean rate between the first and the last frame; None for a picture, also for an animated one of which the first frame is
    used."""


def is_clip(file: DataFile) -> bool:
    """By its name: only files of the suffixes above are looked at."""
    return file.suffix in CLIPS


def probe(file: DataFile, reading: Reading = AS_IT_IS) -> MediaInfo:
    """Size and length of a file.  Decodes a picture whole, and of a clip the first frame; its frames are counted, not believed.

    Raises MediaError if the file is empty, cut off, too large, or not what its name says.
    """
    if is_clip(file):
        look = look_at_clip(file)
        size, timeline = clip_size(file, look), look.timeline
    else:
        size, timeline = read_picture(file).size, _animation(file, reading)
    if timeline is None:
        return MediaInfo(*size, frames=1, fps=None)
    return MediaInfo(*size, frames=timeline.frames, fps=float(timeline.fps))


def load_pixels(
    file: DataFile,
    bucket: Bucket,
    fps: float | None = None,
    first_frame: int = 0,
    max_frames: int | None = None,
    framing: Framing = CENTRE,
    reading: Reading = AS_IT_IS,
    item_size: tuple[int, int] | None = None,
) -> Tensor:
    """The pixels of one sample: fp32 [3, frames, height, width] in [-1, 1]; with ``max_frames`` the first ones of them.

    Frame ``i`` of a clip is the source frame nearest to ``(first_frame + i) / fps`` seconds after the clip's first one (of two
    equally near, the earlier); without ``fps`` the file is taken for a picture.  Each frame is cut to the framing's box, scaled
    (Lanczos) so that it just covers the bucket, and cropped where the framing says.  ``item_size``: for a control picture or a
    given frame, the size of the item whose framing this is (see ``framing.framing_for``); None: the file is the item.
    Raises MediaError if the frames that are needed do not decode, or the box is no part of the picture.
    """

    def fitted(image: Image.Image) -> np.ndarray:
        return _fitted(file, _on_background(image, reading.background), bucket, framing, item_size)

    frames = list(_frames(file, bucket.frames, fps, first_frame, max_frames, reading, fitted))
    pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def load_mask(
    file: DataFile,
    bucket: Bucket,
    fps: float | None = None,
    first_frame: int = 0,
    framing: Framing = CENTRE,
    reading: Reading = AS_IT_IS,
    item_size: tuple[int, int] | None = None,
) -> Tensor:
    """A sample's mask: fp32 [1, frames, height, width] in [0, 1], the grey values, transparent parts as black.

    ``fps``, ``first_frame``, ``framing`` and ``item_size`` are those of the item: a clip is resampled as the item is, a picture
    holds for all frames.  Raises MediaError like :func:`load_pixels`.
    """

    def fitted(image: Image.Image) -> np.ndarray:
        return _fitted(file, _on_background(image, BLACK).convert("L"), bucket, framing, item_size)

    return _mask(_frames(file, bucket.frames, fps, first_frame, None, reading, fitted, colours=False), bucket)


def load_alpha_mask(
    file: DataFile,
    bucket: Bucket,
    fps: float | None = None,
    first_frame: int = 0,
    framing: Framing = CENTRE,
    reading: Reading = AS_IT_IS,
) -> Tensor:
    """The mask that a file's own alpha channel is, like :func:`load_mask`: 1 everywhere where there is none."""

    def fitted(image: Image.Image) -> np.ndarray:
        alpha = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
        return _fitted(file, alpha, bucket, framing, None)

    return _mask(_frames(file, bucket.frames, fps, first_frame, None, reading, fitted, colours=False), bucket)


def frames_at(info: MediaInfo, fps: float) -> int:
    """How many frames a clip has when resampled to ``fps``: as long as the last one has a source frame that is nearest to it."""
    assert info.fps, "a picture has no frame rate"
    return math.floor((info.frames - 0.5) * fps / info.fps) + 1


def _frames(
    file: DataFile,
    count: int,
    fps: float | None,
    first_frame: int,
    max_frames: int | None,
    reading: Reading,
    fitted: Callable[[Image.Image], np.ndarray],
    colours: bool = True,
) -> Iterator[np.ndarray]:
    """What ``fitted`` makes of each frame that is needed; of a picture one.  Decoding ends with the last frame that is needed."""
    number = min(count, max_frames or count)
    if is_clip(file):
        assert fps, "a clip needs a frame rate"
        look = look_at_clip(file)
        targets = look.timeline.targets(fps, first_frame, number)

        def shown(frame) -> np.ndarray:
            if frame.is_corrupt:
                raise MediaError(file, f"the frame at {float(frame.time or 0):.2f} s, which is needed, is damaged")
            return fitted(upright(frame, look))

        frames = nearest(clip_frames(file, look, targets[0]), targets, 1 / look.timeline.fps, shown)
    elif fps and (timeline := _animation(file, reading)):
        targets = timeline.targets(fps, first_frame, number)
        frames = nearest(read_animation(file, colours), targets, 1 / timeline.fps, fitted)
    else:
        yield fitted(read_picture(file, colours))
        return
    found = 0
    for frame in frames:
        yield frame
        found += 1
    if found < number:
        raise MediaError(file, f"only {found} of the {number} frames that are needed decode")


def _animation(file: DataFile, reading: Reading) -> Timeline | None:
    """For a picture that is taken for a clip."""
    return look_at_animation(file) if reading.animated == "clip" else None


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB.  Before anything is scaled: the colours that transparent pixels hide would be mixed into their neighbours'."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


def _fitted(file: DataFile, image: Image.Image, bucket: Bucket, framing: Framing, item_size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [height, width, channels]: the part of the picture that the framing leaves, in the bucket's size."""
    try:
        own = framing_for(image.size, item_size, framing) if item_size else framing
        cover = covering(image.size, (bucket.width, bucket.height), own)
    except FramingError as error:
        raise MediaError(file, str(error)) from error
    image = image.crop(cover.box) if cover.box else image
    scaled = image.resize((cover.width, cover.height), Image.Resampling.LANCZOS)
    part = np.asarray(scaled.crop((cover.left, cover.top, cover.left + bucket.width, cover.top + bucket.height)))
    return part if part.ndim == 3 else part[..., None]


def _mask(frames: Iterator[np.ndarray], bucket: Bucket) -> Tensor:
    mask = torch.from_numpy(np.stack(list(frames))).permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return mask.div_(255.0).expand(-1, bucket.frames, -1, -1).contiguous()
