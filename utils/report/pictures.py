"""The pictures of a sample as the page shows them: small JPEGs in the page itself."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch import Tensor

from utils.data.media import MediaError, load_pixels
from utils.data.values import Bucket, Sample
from utils.report.findings import Cut

LONG_SIDE = 280
"""Pixels of the longer side of a picture on the page; smaller ones stay as they are."""
LONG_SIDE_OF_FRAMES = 200
"""The same for each frame of a clip."""
LONG_SIDE_OF_ORIGINALS = 112
FRAMES = 6
"""Frames that are shown of a clip, at most: the first, the last, and some between them, evenly spaced."""
QUALITY = 88
NO_LOSS = np.array([214, 40, 90], dtype=np.float32)
"""What lies over the parts where the loss does not count."""

Decode = Callable[[Sample], Tensor | str]
"""Pixels [3, frames, height, width] in [-1, 1] of what is in the cache for a sample, or why there are none."""


@dataclass(frozen=True)
class Picture:
    uri: str
    width: int
    height: int
    label: str = ""


@dataclass(frozen=True)
class Strip:
    """A picture, or frames of a clip, under one title."""

    title: str
    pictures: list[Picture]
    note: str = ""
    """What is to be said instead of pictures, or with them."""


@dataclass
class Shown:
    """Everything that is to be seen of a sample."""

    strips: list[Strip] = field(default_factory=list)
    original: Picture | None = None
    crop: Cut | None = None
    """What of the original the model sees."""
    problem: str = ""
    """Why there are no pictures."""


def shown_of(sample: Sample, crop: Cut | None) -> Shown:
    """What the model sees of a sample, in the pixels that its encoders are given."""
    shown = Shown(crop=crop)
    try:
        pixels = load_pixels(
            sample.file, sample.bucket, sample.fps, sample.first_frame, framing=sample.framing, reading=sample.reading
        )
        shown.strips.append(Strip("as the model sees it", frames_of(pixels, sample)))
        if sample.mask:
            shown.strips.append(Strip("the loss counts where it is not red", frames_of(pixels, sample, _mask(sample, pixels))))
        if sample.controls:
            made = [picture_of(_still(control.file, sample), LONG_SIDE_OF_FRAMES, control.file.name) for control in sample.controls]
            shown.strips.append(Strip("control pictures" if len(made) > 1 else "control picture", made))
        for which, given in sample.known_frames:
            made = picture_of(_still(given.file, sample), LONG_SIDE_OF_FRAMES, given.file.name)
            shown.strips.append(Strip(f"given {which} frame", [made]))
        shown.original = _original(sample)
    except MediaError as error:  # its file's path is not for the page
        shown.problem = f"{error.file.name}: {error.reason}"
    return shown


def decoded_of(sample: Sample, decode: Decode) -> Strip:
    """What is in the cache, as pixels again."""
    pixels = decode(sample)
    if isinstance(pixels, str):
        return Strip("decoded from the cache", [], pixels)
    return Strip("decoded from the cache", frames_of(pixels, sample))


def frames_of(pixels: Tensor, sample: Sample, mask: Tensor | None = None) -> list[Picture]:
    """Of pixels [3, frames, height, width] the frames that are shown, with ``mask`` [1, frames, height, width] laid over."""
    count = pixels.shape[1]
    long_side = LONG_SIDE if count == 1 else LONG_SIDE_OF_FRAMES
    made = []
    for frame in evenly(count, FRAMES):
        seconds = f", {(sample.first_frame + frame) / sample.fps:.2f} s" if sample.fps else ""
        label = f"frame {frame + 1} of {count}{seconds}" if count > 1 else ""
        still = pixels[:, frame]
        made.append(picture_of(still, long_side, label, None if mask is None else mask[:, frame]))
    return made


def picture_of(still: Tensor, long_side: int, label: str = "", mask: Tensor | None = None) -> Picture:
    """A picture [3, height, width] in [-1, 1] as a JPEG.  ``mask`` [1, height, width] in [0, 1]."""
    levels = ((still.float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    if mask is not None:
        hidden = 0.65 * (1 - mask.permute(1, 2, 0).numpy())
        levels = levels * (1 - hidden) + NO_LOSS * hidden
    image = Image.fromarray(levels.round().astype(np.uint8))
    if max(image.size) > long_side:
        image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY, subsampling=0)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", *image.size, label)


def evenly(count: int, most: int) -> list[int]:
    """At most so many of ``range(count)``, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)] if most > 1 else [0]


def _still(file, sample: Sample) -> Tensor:
    """A picture that belongs to a sample, [3, height, width]."""
    return load_pixels(file, replace(sample.bucket, frames=1), framing=sample.framing, reading=sample.reading)[:, 0]


def _mask(sample: Sample, pixels: Tensor) -> Tensor:
    """[1, frames, height, width] in [0, 1]."""
    still = (_still(sample.mask.file, sample).mean(0, keepdim=True) + 1) / 2
    return still[:, None].expand(-1, pixels.shape[1], -1, -1)


def _original(sample: Sample) -> Picture | None:
    """The whole file, or the first frame of the sample, small."""
    if sample.original_size is None:
        return None
    scale = LONG_SIDE_OF_ORIGINALS / max(sample.original_size)
    width, height = (max(1, round(side * scale)) for side in sample.original_size)
    whole = Bucket(width, height, 1)
    pixels = load_pixels(sample.file, whole, sample.fps, sample.first_frame, reading=sample.reading)
    return picture_of(pixels[:, 0], LONG_SIDE_OF_ORIGINALS)
