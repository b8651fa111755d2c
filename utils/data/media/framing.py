"""Which part of a picture is used, and how large it becomes: numbers only, no pixels.

A picture is cut to its box, if it has one, scaled so that it just covers the bucket, and what is too much is cut off.  Sizes are
(width, height) in pixels, of files as they are displayed.
"""

from dataclasses import dataclass

from utils.data.values import CENTRE, Framing


class FramingError(ValueError):
    """A box that is no part of the picture; the text says which box and which size."""


@dataclass(frozen=True)
class Covering:
    """The size that a picture, or its box, is scaled to, and the left upper corner of what is cut out of that, in pixels."""

    width: int
    height: int
    left: int
    top: int
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) of what is scaled, in pixels of the picture; None: all of it."""

    def corner(self, size: tuple[int, int]) -> tuple[int, int]:
        """(left, top) of what is cut out, in the whole picture of ``size`` were it scaled as the box is."""
        if self.box is None:
            return self.left, self.top
        left, top, right, bottom = self.box
        return self.left + round(left * self.width / (right - left)), self.top + round(top * self.height / (bottom - top))


def covering(size: tuple[int, int], target: tuple[int, int], framing: Framing = CENTRE) -> Covering:
    """How a picture of ``size`` just covers ``target``, framed.  Raises FramingError if the box is no part of the picture."""
    width, height = _framed(size, framing)
    scale = max(target[0] / width, target[1] / height)
    width, height = max(target[0], round(width * scale)), max(target[1], round(height * scale))
    return Covering(width, height, int((width - target[0]) * framing.x), int((height - target[1]) * framing.y), framing.box)


def cropped_share(size: tuple[int, int], target: tuple[int, int], framing: Framing = CENTRE) -> float:
    """The share of the picture's area that is cut off, by its box and to fit ``target``: 0 if all of it stays."""
    cover, (width, height) = covering(size, target, framing), _framed(size, framing)
    seen = (target[0] * width / cover.width) * (target[1] * height / cover.height)
    return 1 - seen / (size[0] * size[1])


def enlargement(size: tuple[int, int], target: tuple[int, int], framing: Framing = CENTRE) -> float:
    """What the picture's sides are multiplied by to cover ``target``: above 1 it is upscaled."""
    width, height = _framed(size, framing)
    return max(target[0] / width, target[1] / height)


def framing_for(size: tuple[int, int], item_size: tuple[int, int], framing: Framing) -> Framing:
    """The framing of an item of ``item_size`` for what belongs to it (a mask, a control picture) and has another ``size``.

    Its box is the same part of that picture: its sides in proportion, rounded to whole pixels, at least one.
    """
    if framing.box is None or size == item_size:
        return framing
    _framed(item_size, framing)
    left, top, right, bottom = framing.box
    (x, width), (y, height) = ((side, side / whole) for side, whole in zip(size, item_size, strict=True))
    left, top = min(round(left * width), x - 1), min(round(top * height), y - 1)
    right, bottom = max(round(right * width), left + 1), max(round(bottom * height), top + 1)
    return Framing((left, top, right, bottom), framing.x, framing.y)


def _framed(size: tuple[int, int], framing: Framing) -> tuple[int, int]:
    """Width and height of what is used of the picture, before it is cut to the bucket's shape."""
    if framing.box is None:
        return size
    left, top, right, bottom = framing.box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise FramingError(
            f"the box {list(framing.box)} is no part of the {size[0]}x{size[1]} pixels that it has; a box is [left, top, right, "
            "bottom] in pixels of the picture as it is displayed"
        )
    return right - left, bottom - top
