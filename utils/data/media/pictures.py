"""Pictures as they look: decoded with Pillow, turned upright, in sRGB, with 8 bits a channel; animated ones frame by frame."""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from utils.data.media.files import DataFile, MediaError, opened, tell_once
from utils.data.media.resampling import Timeline
from utils.data.media.signatures import HEIC

log = logging.getLogger(__name__)

# Pillow would warn of half as many through the interpreter, and tell neither the file nor its size.  So it is held to here.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""A larger picture, or frame of a clip, is refused: a small file can promise more than any memory holds."""
Image.MAX_IMAGE_PIXELS = None

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_ANIMATED = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
# Browsers show frames that are to be shown for less than this, or not at all, for a tenth of a second.
_SHORTEST_MS, _DEFAULT_MS = 10, 100

# EXIF's orientation -> what turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS = threading.Lock()

# A mode -> the colours that a profile must be made for.
_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}


def read_picture(file: DataFile, colours: bool = True) -> Image.Image:
    """The picture, or the first frame of an animated one: mode RGB, or RGBA if parts of it are transparent.

    ``colours=False`` for what means numbers, not colours: its profile is not looked at.
    """
    with _picture(file) as image:
        return _plain(file, image, colours)


def read_animation(file: DataFile, colours: bool = True) -> Iterator[tuple[Fraction, Image.Image]]:
    """The frames of an animated picture like :func:`read_picture`, each with the time in seconds at which it is shown."""
    with _picture(file) as image:
        for time in _frames(image):
            frame = _plain(file, image, colours)
            yield time, frame.copy() if frame is image else frame  # the next frame is drawn into the same picture


def look_at_animation(file: DataFile) -> Timeline | None:
    """When the frames of an animated picture are shown, all of them decoded for it; None for one that is not animated."""
    with _picture(file) as image:
        # Other formats hold several pictures too, but those are pages, sizes or depths.
        if image.format not in _ANIMATED or getattr(image, "n_frames", 1) - _first_frame(image) == 1:
            return None
        times = list(_frames(image))
        return Timeline(len(times), times[0], times[-1])


def refuse_if_huge(file: DataFile, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise MediaError(
            file,
            f"it has {size[0]}x{size[1]} pixels, and {MAX_PIXELS:,} ({MAX_PIXELS // 10**6} megapixels) are the most that are read; "
            "make it smaller",
        )


@contextmanager
def _picture(file: DataFile) -> Iterator[Image.Image]:
    """The picture, not yet decoded; whatever Pillow stumbles over in the block becomes a MediaError."""
    with opened(file, "picture") as (stream, signature):
        formats = _FORMATS
        if signature == HEIC:
            if not _heic_is_read():
                raise MediaError(file, 'it is a HEIC picture, which needs pillow-heif: pip install "flowstage[heic]"')
            formats = (*_FORMATS, "HEIF")
        try:
            with Image.open(stream, formats=formats) as image:
                refuse_if_huge(file, image.size)
                yield image
        except MediaError:
            raise
        except UnidentifiedImageError as error:
            known = f"it begins like {signature.text}, and is cut off or damaged" if signature else "it is no picture that is read"
            raise MediaError(file, known) from error
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
            raise MediaError(file, f"it does not decode as a picture ({type(error).__name__}: {error})") from error


@cache
def _heic_is_read() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _first_frame(image: Image.Image) -> int:
    """A PNG may begin with a picture that is no part of its animation."""
    return int(getattr(image, "default_image", False))


def _frames(image: Image.Image) -> Iterator[Fraction]:
    """Go through the frames of an opened animation; yields when each is shown, in seconds."""
    time = Fraction(0)
    for index in range(_first_frame(image), image.n_frames):
        image.seek(index)
        image.load()  # which some formats need before they tell the duration
        yield time
        duration = image.info.get("duration", 0)
        time += Fraction(duration if duration > _SHORTEST_MS else _DEFAULT_MS) / 1000


# ── colours ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plain(file: DataFile, image: Image.Image, colours: bool) -> Image.Image:
    """Upright, RGB or RGBA with 8 bits a channel; the picture itself if it is so already."""
    image.load()
    profile = image.info.get("icc_profile") if colours else None
    image = _upright(file, image)
    if image.mode.startswith("I;16"):
        image = _upper_bytes(image)
    if image.mode in ("I", "F"):
        raise MediaError(file, f"pixels of type {image.mode} have no known range; save it with 8 or 16 bits per channel")
    alpha = None
    if image.has_transparency_data:
        both = image.convert("RGBA")
        alpha, image = both.getchannel("A"), image.convert("L") if image.mode in ("1", "L", "LA") else both.convert("RGB")
    elif image.mode in ("P", "RGBX"):
        image = image.convert("RGB")
    image = _to_srgb(file, image, profile)
    if alpha is not None and alpha.getextrema() != (255, 255):
        image.putalpha(alpha)
    return image


def _upright(file: DataFile, image: Image.Image) -> Image.Image:
    # Pillow tells of broken EXIF data through the interpreter's warnings, which know no file and are the same for all threads.
    with _WARNINGS, warnings.catch_warnings(record=True) as problems:
        warnings.simplefilter("always")
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception as error:  # as many kinds as there are ways to write EXIF wrongly
            orientation = None
            problems.append(error)
    if problems:
        problem = getattr(problems[0], "message", problems[0])
        tell_once(log, f"{file}: its EXIF data is broken ({problem}); it is turned as far as that can be read")
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _upper_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits; Pillow itself would clip it to 255.  Of 16-bit colours it gives the upper bytes too."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(file: DataFile, image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB of any mode without transparency; a profile that cannot be used is named in the log."""
    if profile:
        image = image.convert("L") if image.mode == "1" else image
        try:
            needs_colours, transform = _transform(profile, image.mode)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            tell_once(log, f"{file}: its colour profile is not used ({error}); its colours are taken for sRGB")
        else:
            image = image.convert("RGB") if needs_colours else image
            if transform:
                return ImageCms.applyTransform(image, transform)
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _to_srgb_transform(ImageCms.createProfile("LAB"), "LAB"))
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> tuple[bool, "ImageCms.ImageCmsTransform | None"]:
    """Whether the picture is made RGB first, and the way to sRGB; None if the colours are sRGB already.  Raises if it cannot be."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    needs_colours = space == "RGB " and mode == "L"  # a grey picture in a space of colours
    if needs_colours:
        mode = "RGB"
    if _SPACES.get(mode) != space:
        raise ValueError(f"it is one for {space.strip()}, and the picture is {mode}")
    transform = _to_srgb_transform(source, mode)
    if mode == "RGB":
        # All of the space, sparsely.  What hardly differs from sRGB is sRGB as somebody has rounded it.
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        changed = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
        if np.abs(changed.astype(int) - cube).max() <= 1:
            return needs_colours, None
    return needs_colours, transform


def _to_srgb_transform(source: "ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile", mode: str) -> "ImageCms.ImageCmsTransform":
    return ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
