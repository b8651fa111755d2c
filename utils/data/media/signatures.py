"""What a file is, by its first bytes: names lie."""

import codecs
from dataclasses import dataclass
from typing import Literal

HEAD = 128
"""Bytes of a file's beginning that are looked at."""

MediaKind = Literal["picture", "clip"]


@dataclass(frozen=True)
class Signature:
    """What the first bytes of a file say that it is."""

    text: str
    kind: MediaKind | None
    """None: neither, and nothing that is read."""
    advice: str
    """The suffix that such a file has; for what is not read, what to do."""


HEIC = Signature("a HEIC picture", "picture", ".heic")
_AVIF = Signature("an AVIF picture", "picture", ".avif")
_MP4 = Signature("an MP4 or QuickTime clip", "clip", ".mp4")

_MATROSKA, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"

# The first that fits counts.
_SIGNATURES = [
    (b"\x89PNG\r\n\x1a\n", Signature("a PNG picture", "picture", ".png")),
    (b"\xff\xd8\xff", Signature("a JPEG picture", "picture", ".jpg")),
    (b"GIF8", Signature("a GIF picture", "picture", ".gif")),
    (b"BM", Signature("a BMP picture", "picture", ".bmp")),
    (b"II*\x00", Signature("a TIFF picture", "picture", ".tif")),
    (b"MM\x00*", Signature("a TIFF picture", "picture", ".tif")),
    (b"\x00\x00\x00\x0cjP  \r\n", Signature("a JPEG 2000 picture", "picture", ".jp2")),
    (_MATROSKA, Signature("a Matroska or WebM clip", "clip", ".mkv")),
    (b"FLV\x01", Signature("a Flash clip", "clip", ".flv")),
    (b"\x00\x00\x01\xba", Signature("an MPEG clip", "clip", ".mpg")),
    (b"0&\xb2u\x8ef\xcf\x11", Signature("a Windows Media clip", "clip", ".wmv")),
    (b"PK\x03\x04", Signature("a ZIP file", None, "unpack it")),
    (b"8BPS", Signature("a Photoshop document", None, "save it as .png or .tif")),
]
# Texts, in small letters, perhaps behind spaces and a byte order mark.
_TEXTS = [
    (b"%pdf", Signature("a PDF document", None, "save its pictures as .png or .jpg")),
    (b"version https://git-lfs", Signature("a pointer of Git LFS", None, "fetch the file itself with `git lfs pull`")),
    (b"<!doctype html", Signature("a web page", None, "download the file itself")),
    (b"<html", Signature("a web page", None, "download the file itself")),
    (b"<svg", Signature("an SVG drawing", None, "save it as .png")),
    (b"<?xml", Signature("an XML or SVG file", None, "save it as .png")),
]


def signature_of(head: bytes) -> Signature | None:
    """What a file is whose first ``HEAD`` bytes these are; None if that is not known."""
    if head[4:8] == b"ftyp":
        brands = head[8 : max(16, int.from_bytes(head[:4], "big"))]
        if b"avif" in brands or b"avis" in brands:
            return _AVIF
        return HEIC if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")) else _MP4
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"AVI "):
        webp = head[8:12] == b"WEBP"
        return Signature("a WebP picture", "picture", ".webp") if webp else Signature("an AVI clip", "clip", ".avi")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next(
        (found for known, start in ((_SIGNATURES, head), (_TEXTS, text)) for mark, found in known if start.startswith(mark)), None
    )


def promised_size(head: bytes) -> int | None:
    """How many bytes a file that begins so says that it has, for formats whose readers do not mind if there are fewer."""
    if head[:4] == b"RIFF" and (size := int.from_bytes(head[4:8], "little")) not in (0, 0xFFFFFFFF):
        return 8 + size
    place = head.find(_SEGMENT) + len(_SEGMENT)
    if head[:4] == _MATROSKA and place >= len(_SEGMENT) and place + 8 <= len(head):
        # The number of leading zero bits is that of the bytes which follow; all ones behind them: the size is not known.
        length = 9 - head[place].bit_length()
        size = int.from_bytes(head[place : place + length], "big") & ((1 << 7 * length) - 1)
        return place + length + size if size != (1 << 7 * length) - 1 else None
    return None
