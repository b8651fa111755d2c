"""The pictures of a sample as the page shows them: small JPEGs in the page itself."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from utils.data.cache.keys import Input
from utils.data.cache.reading import ItemReader
from utils.data.encoders import ConditionEncoder
from utils.data.masks import MaskEncoder, has_mask
from utils.data.media.pixels import MediaError, load_pixels
from utils.data.values import Bucket, Sample
from utils.report.findings import Cut

LONG_SIDE = 280
"""Pixels of the longer side of a picture on the page; smaller ones stay as they are."""
LONG_SIDE_OF_FRAMES = 190
"""The same for each frame of a clip."""
LONG_SIDE_OF_ORIGINALS = 112
FRAMES = 6
"""Frames that are shown of a clip, at most: the first, the last, and some between them, evenly spaced."""
QUALITY = 90
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


class Eyes:
    """Looks at samples as the cache does: at what the run's encoders are given, file by file as it is read for them."""

    def __init__(self, encoders: Sequence[ConditionEncoder]):
        self._reader = ItemReader()
        looking = [encoder for encoder in encoders if encoder.reads != "caption"]
        whole = [encoder for encoder in looking if "pixels" in encoder.reads and encoder.max_frames is None]
        self._encoders = [*whole[:1], *[encoder for encoder in looking if "controls" in encoder.reads][:1]]
        seen = {frame for encoder in self._encoders for frame in encoder.known_frames}
        self._encoders += [encoder for encoder in looking if not seen.issuperset(encoder.known_frames)]

    def look(self, sample: Sample, crop: Cut | None) -> Shown:
        """What the model sees of a sample, in the pixels that its encoders are given."""
        shown = Shown(crop=crop)
        masks = [MaskEncoder()] if has_mask(sample) else []
        try:
            items = [self._reader.item(Input(sample, sample.caption), encoder) for encoder in [*self._encoders, *masks]]
            pixels = next(item.pixels for item in items if item.pixels is not None)
            shown.strips.append(Strip("as the model sees it", frames_of(pixels, sample)))
            for item in items:
                if item.mask is not None:
                    shown.strips.append(Strip("the loss counts where it is not red", frames_of(pixels, sample, item.mask)))
            controls = next((item.controls for item in items if item.controls), ())
            if controls:
                made = [
                    picture_of(pixels[:, 0], LONG_SIDE_OF_FRAMES, control.file.name)
                    for pixels, control in zip(controls, sample.controls, strict=True)
                ]
                shown.strips.append(Strip("control pictures" if len(made) > 1 else "control picture", made))
            given = {frame: pixels for item in items for frame, pixels in item.known_frames.items()}
            for frame, control in sample.known_frames:
                if frame in given:
                    made = picture_of(given[frame][:, 0], LONG_SIDE_OF_FRAMES, control.file.name)
                    shown.strips.append(Strip(f"given {frame} frame", [made]))
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


def _original(sample: Sample) -> Picture | None:
    """The whole file, or the first frame of the sample, small."""
    if sample.original_size is None:
        return None
    scale = LONG_SIDE_OF_ORIGINALS / max(sample.original_size)
    width, height = (max(1, round(side * scale)) for side in sample.original_size)
    whole = Bucket(width, height, 1)
    pixels = load_pixels(sample.file, whole, sample.fps, sample.first_frame, reading=sample.reading)
    return picture_of(pixels[:, 0], LONG_SIDE_OF_ORIGINALS)
