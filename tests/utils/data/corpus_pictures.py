"""The awkward pictures: how they lie in the file, their colours and transparency, animations, broken and misnamed files."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
from PIL import Image, ImageCms

from tests.utils.data import icc
from tests.utils.data.corpus import Corpus, Used, picture
from utils.data.media.pixels import MediaInfo
from utils.data.values import Reading

ORIENTATION = 0x0112
# What Pillow finds no picture in once the half of it is missing, and what tells its own size.
CUT = {"AVIF": "it begins like an AVIF picture, and is cut off or damaged", "WEBP": "it is cut off: it says that it has "}
# EXIF's orientation -> what turns the stored array [height, width, ...] upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


def real(corpus: Corpus, name: str, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """One of the real pictures, small; its profile is left out."""
    with Image.open(corpus.images[name]) as image:
        small = image.convert(mode).resize(size)
    small.info = {}
    return small


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(values: np.ndarray, *chunks: tuple[bytes, bytes], size: tuple[int, int] | None = None) -> bytes:
    """A PNG of uint8 or uint16 [height, width, channels], written by hand; ``size``: what its header says instead."""
    height, width, channels = values.shape
    rows = values.astype(values.dtype.newbyteorder(">")).tobytes()
    stride = len(rows) // height
    data = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(height))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", *(size or (width, height)), 8 * values.itemsize, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def over(colours: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Colours [h, w, 3] behind which the background is seen where alpha [h, w] is small."""
    share = alpha[..., None] / 255.0
    return np.round(colours * share + np.array(background) * (1 - share)).astype(np.uint8)


def add_pictures(corpus: Corpus) -> None:
    astronaut = real(corpus, "astronaut.png", (96, 64))
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        upright = np.ascontiguousarray(turn(np.asarray(astronaut)))
        corpus.add(
            f"EXIF orientation {orientation}", f"turned {orientation}.png", saved(astronaut, "PNG", exif=exif), picture(upright)
        )
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for format, suffix, options in (("JPEG", "jpg", {"quality": 90}), ("WEBP", "webp", {"lossless": True}), ("TIFF", "tif", {})):
        with Image.open(io.BytesIO(saved(astronaut, format, **options))) as image:
            upright = np.ascontiguousarray(UPRIGHT[6](np.asarray(image)))
        turned = saved(astronaut, format, exif=exif, **options)
        corpus.add(f"EXIF orientation in {format}", f"turned.{suffix}", turned, picture(upright))
    as_it_lies = picture(np.asarray(astronaut))
    corpus.add("broken EXIF", "broken exif.png", saved(astronaut, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage"), as_it_lies)

    camera = np.asarray(real(corpus, "camera.png", (96, 64), "L"))
    deep = camera.astype(np.uint16) * 257
    corpus.add("16-bit grey PNG", "grey16.png", png(deep[..., None]), picture(grey(camera)))
    corpus.add("16-bit grey TIFF", "grey16.tif", lambda path: Image.fromarray(deep).save(path), picture(grey(camera)))
    colours = np.asarray(astronaut)
    alpha = np.asarray(real(corpus, "camera.png", (96, 64), "L"))
    deep_colours, deep_alpha = colours.astype(np.uint16) * 257, alpha.astype(np.uint16)[..., None] * 257
    corpus.add("16-bit RGB", "rgb16.png", png(deep_colours), as_it_lies)
    corpus.add(
        "16-bit RGBA",
        "rgba16.png",
        png(np.concatenate([deep_colours, deep_alpha], axis=-1)),
        picture(over(colours, alpha), tolerance=1),
    )
    corpus.add(
        "16-bit grey with alpha",
        "la16.png",
        png(np.concatenate([deep[..., None], deep_alpha], axis=-1)),
        picture(over(grey(camera), alpha), tolerance=1),
    )
    hidden = int(np.median(camera))
    corpus.add(
        "16-bit grey with a transparent value",
        "trns16.png",
        png(deep[..., None], (b"tRNS", struct.pack(">H", hidden * 257))),
        picture(np.where(grey(camera) == hidden, 255, grey(camera)).astype(np.uint8)),
    )
    most = tuple(int(value) for value in colours[10, 10])
    corpus.add(
        "16-bit RGB with a transparent colour",
        "trns rgb16.png",
        png(deep_colours, (b"tRNS", struct.pack(">3H", *(257 * value for value in most)))),
        picture(np.where((colours == most).all(axis=-1, keepdims=True), 255, colours).astype(np.uint8)),
    )
    corpus.add(
        "RGB with a transparent colour",
        "trns.png",
        png(colours, (b"tRNS", struct.pack(">3H", *most))),
        picture(np.where((colours == most).all(axis=-1, keepdims=True), 255, colours).astype(np.uint8)),
    )
    black_and_white = Image.fromarray(camera).convert("1")
    corpus.add("1-bit", "bits.png", saved(black_and_white, "PNG"), picture(grey(np.asarray(black_and_white, np.uint8) * 255)))
    palette = astronaut.quantize(32)
    table = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    indices = np.asarray(palette)
    corpus.add("palette", "palette.png", saved(palette, "PNG"), picture(table[indices]))
    shares = np.linspace(0, 255, len(table)).astype(np.uint8)
    corpus.add(
        "palette with transparency",
        "palette alpha.png",
        saved(palette, "PNG", transparency=shares.tobytes()),
        picture(over(table[indices], shares[indices]), tolerance=1),
    )
    corpus.add(
        "grey with alpha",
        "la.png",
        png(np.stack([camera, alpha[::-1]], axis=-1)),
        picture(over(grey(camera), alpha[::-1]), tolerance=1),
    )
    with Image.open(corpus.images["horse.png"]) as horse:
        stored = np.asarray(horse.convert("RGBA"))
    red = over(stored[..., :3], stored[..., 3], (200, 30, 60))
    corpus.add(
        "transparent on a chosen background",
        "horse.png",
        saved(Image.fromarray(stored), "PNG"),
        picture(red, tolerance=1),
        settings={"background": "#c81e3c"},
        reading=Reading(background=(200, 30, 60)),
    )
    corpus.add("hidden colours under transparency", "fringe.png", *_fringe(corpus))
    for kind, values in (("float", camera.astype(np.float32) / 255), ("int", camera.astype(np.int32))):
        corpus.add(
            f"32-bit {kind} TIFF",
            f"{kind}32.tif",
            lambda path, values=values: Image.fromarray(values).save(path),
            f"pixels of type {'F' if kind == 'float' else 'I'} have no known range",
        )
    thin = real(corpus, "coffee.png", (960, 6))
    scaled = np.asarray(thin.resize((2560, 16), Image.Resampling.LANCZOS))[:, 1264:1296]
    corpus.add(
        "very wide", "thin.png", saved(thin, "PNG"), lambda path: Used(MediaInfo(960, 6, 1, None), scaled[None], tolerance=0)
    )
    dot = np.full((1, 16, 16, 3), colours[5, 5])
    corpus.add("one pixel", "dot.png", saved(astronaut.crop((5, 5, 6, 6)), "PNG"), lambda path: Used(MediaInfo(1, 1, 1, None), dot))
    _add_animations(corpus)


def _fringe(corpus: Corpus) -> tuple[bytes, object]:
    """Black lies under the transparent half: scaled before it is put on the background, it would darken the edge."""
    colours = np.asarray(real(corpus, "coffee.png", (128, 96))).copy()
    alpha = np.zeros((96, 128), np.uint8)
    alpha[:, 61:] = 255
    colours[alpha == 0] = 0
    flat = Image.fromarray(over(colours, alpha))
    half = np.asarray(flat.resize((64, 48), Image.Resampling.LANCZOS))
    stored = png(np.concatenate([colours, alpha[..., None]], axis=-1))
    return stored, lambda path: Used(MediaInfo(128, 96, 1, None), half[None])


def _add_animations(corpus: Corpus) -> None:
    names = ("astronaut.png", "coffee.png", "chelsea.png", "hubble_deep_field.jpg")
    frames = [real(corpus, name, (64, 48)) for name in names]
    milliseconds = [100, 300, 40, 200]
    starts = [Fraction(sum(milliseconds[:index]), 1000) for index in range(4)]
    mean_fps = float(3 / starts[-1])
    # At 10 fps: the frames that begin nearest to 0, 0.1, ... 0.5 s, of two equally near the earlier.
    shown = [0, 1, 1, 2, 2, 3]
    assert shown == [min(range(4), key=lambda index: (abs(starts[index] - Fraction(i, 10)), index)) for i in range(6)]

    def clip(stored: list[np.ndarray], tolerance: int = 0):
        return lambda path: Used(MediaInfo(64, 48, 4, mean_fps), np.stack([stored[i] for i in shown]), tolerance, fps=10.0)

    exact = [np.asarray(frame) for frame in frames]
    palettes = [frame.quantize(64) for frame in frames]
    drawn = [np.array(one.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(one)] for one in palettes]
    options = {"save_all": True, "duration": milliseconds, "loop": 0}
    gif = saved(palettes[0], "GIF", append_images=palettes[1:], **options)
    corpus.add("animated GIF", "moving.gif", gif, clip(drawn))
    corpus.add(
        "first frame of a GIF",
        "first.gif",
        gif,
        picture(drawn[0]),
        settings={"animated": "first_frame"},
        reading=Reading(animated="first_frame"),
    )
    corpus.add("GIF with one frame", "still.gif", saved(palettes[0], "GIF"), picture(drawn[0]))
    webp = saved(frames[0], "WEBP", append_images=frames[1:], lossless=True, **options)
    corpus.add("animated WebP", "moving.webp", webp, clip(exact))
    corpus.add("animated PNG", "moving.png", saved(frames[0], "PNG", append_images=frames[1:], **options), clip(exact))
    corpus.add(
        "animated PNG with a title picture",
        "titled.png",
        saved(frames[3], "PNG", append_images=frames, default_image=True, **options),
        clip(exact),
    )
    avif = saved(frames[0], "AVIF", append_images=frames[1:], quality=100, subsampling="4:4:4", **options)
    corpus.add("animated AVIF", "moving.avif", avif, clip(exact, tolerance=6))
    corpus.add("GIF called JPEG", "moving.jpg", gif, clip(drawn))
    corpus.add("GIF called MP4", "really a gif.mp4", gif, "it is a GIF picture, which its name does not say; rename it to")
    corpus.add("truncated GIF", "cut.gif", gif[: len(gif) * 2 // 3], "it does not decode as a picture")
    corpus.add("truncated animated WebP", "cut moving.webp", webp[: len(webp) * 2 // 3], CUT["WEBP"])


def add_colours(corpus: Corpus) -> None:
    astronaut = real(corpus, "astronaut.png", (96, 64))
    colours = np.asarray(astronaut)
    with Image.open(corpus.images["rocket.jpg"]) as rocket:
        adobe = np.asarray(rocket)
    corpus.add(
        "Adobe RGB", "rocket.jpg", corpus.images["rocket.jpg"].read_bytes(), picture(icc.to_srgb(adobe, icc.ADOBE_RGB), tolerance=3)
    )
    wide = icc.matrix_profile(icc.DISPLAY_P3)
    in_srgb = icc.to_srgb(colours, icc.DISPLAY_P3)
    corpus.add("Display P3", "p3.png", saved(astronaut, "PNG", icc_profile=wide), picture(in_srgb, tolerance=2))
    alpha = np.asarray(real(corpus, "camera.png", (96, 64), "L"))
    with_alpha = Image.fromarray(np.concatenate([colours, alpha[..., None]], axis=-1))
    corpus.add(
        "Display P3 with alpha",
        "p3 alpha.png",
        saved(with_alpha, "PNG", icc_profile=wide),
        picture(over(in_srgb, alpha), tolerance=2),
    )
    camera = Image.fromarray(alpha)
    dark = icc.to_srgb(grey(alpha), icc.SRGB, gamma=1.796875)
    corpus.add(
        "grey with a profile", "linear.png", saved(camera, "PNG", icc_profile=icc.grey_profile()), picture(dark, tolerance=2)
    )
    corpus.add(
        "grey with a colour profile",
        "grey p3.png",
        saved(camera, "PNG", icc_profile=wide),
        picture(icc.to_srgb(grey(alpha), icc.DISPLAY_P3), tolerance=2),
    )
    corners = np.random.default_rng(0).integers(40, 216, (2, 2, 2, 2, 3), np.uint8)
    corners[0, 0, 0, 0], corners[1, 1, 1, 1], corners[0, 0, 0, 1] = (255, 128, 128), (0, 128, 128), (0, 128, 128)
    inks = np.stack(np.meshgrid(*[[0, 255]] * 4, indexing="ij"), axis=-1).reshape(4, 4, 4).astype(np.uint8)
    patches = inks.repeat(16, axis=0).repeat(16, axis=1)
    printed = icc.lab_to_srgb(corners.reshape(4, 4, 3)).repeat(16, axis=0).repeat(16, axis=1)
    cmyk = Image.frombytes("CMYK", (64, 64), patches.tobytes())
    profile = icc.cmyk_profile(corners)
    corpus.add("CMYK with a profile", "press.tif", saved(cmyk, "TIFF", icc_profile=profile), picture(printed, tolerance=2))
    inverse = 255 - colours
    plain = Image.frombytes("CMYK", (96, 64), np.concatenate([inverse, np.zeros((64, 96, 1), np.uint8)], axis=-1).tobytes())
    corpus.add("CMYK TIFF", "cmyk.tif", saved(plain, "TIFF"), picture(colours))
    # JPEG files of four colours are written inverted, as Adobe began it.
    corpus.add("CMYK JPEG", "cmyk.jpg", saved(plain, "JPEG", quality=100, subsampling=0), picture(colours, tolerance=8))
    lab = ImageCms.applyTransform(
        astronaut, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    )
    corpus.add("Lab TIFF", "lab.tif", saved(lab, "TIFF"), picture(colours, tolerance=12))
    as_it_lies = picture(colours)
    for name, broken in (("garbage", b"no profile at all"), ("cut", wide[:300]), ("for another kind", profile)):
        corpus.add(f"profile: {name}", f"profile {name}.png", saved(astronaut, "PNG", icc_profile=broken), as_it_lies)


def add_files(corpus: Corpus) -> None:
    coffee = real(corpus, "coffee.png", (96, 64))
    decoded = np.asarray(coffee)
    jpeg = saved(coffee, "JPEG", quality=90)
    with Image.open(io.BytesIO(jpeg)) as image:
        as_jpeg = picture(np.asarray(image))
    clip = corpus.clips["carphone_distorted.mp4"].read_bytes()
    corpus.add("JPEG called PNG", "really a jpeg.png", jpeg, as_jpeg)
    corpus.add("PNG called JPEG", "really a png.jpg", saved(coffee, "PNG"), picture(decoded))
    corpus.add(
        "clip called JPEG", "really a clip.jpg", clip, "it is an MP4 or QuickTime clip, which its name does not say; rename it"
    )
    corpus.add("JPEG called MP4", "really a jpeg.mp4", jpeg, "it is a JPEG picture, which its name does not say; rename it")
    corpus.add("web page called JPEG", "page.jpg", b"\xef\xbb\xbf<!DOCTYPE html><title>404</title>", "it is a web page")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    corpus.add("pointer of Git LFS", "pointer.png", pointer, "it is a pointer of Git LFS")
    corpus.add("text called PNG", "text.png", b"no picture\n" * 50, "it is no picture that is read")
    corpus.add("zero bytes called PNG", "empty.png", b"", "the file is empty")
    corpus.add("nothing but zeros", "zeros.png", bytes(5000), "it is no picture that is read")
    for format, suffix, options in (
        ("PNG", "png", {}),
        ("JPEG", "jpg", {}),
        ("JPEG", "progressive.jpg", {"progressive": True}),
        ("WEBP", "webp", {}),
        ("AVIF", "avif", {}),
        ("TIFF", "tif", {}),
        ("BMP", "bmp", {}),
        ("JPEG2000", "jp2", {}),
    ):
        whole = saved(coffee, format, **options)
        corpus.add(
            f"truncated {suffix}",
            f"cut {format}.{suffix}",
            whole[: len(whole) // 2],
            CUT.get(format, "it does not decode as a picture"),
        )
    huge = png(decoded, size=(60_000, 50_000))
    corpus.add("decompression bomb", "bomb.png", huge, "it has 60000x50000 pixels, and 178,956,970 (178 megapixels) are the most")
    gif = bytearray(saved(coffee.quantize(16), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    corpus.add("decompression bomb as GIF", "bomb.gif", bytes(gif), "it has 65535x65535 pixels, and ")
    text = png(decoded, (b"zTXt", b"comment\0\0" + zlib.compress(bytes(64 << 20))))
    corpus.add("bomb in a PNG's text", "text bomb.png", text, "it does not decode as a picture (ValueError: ")
    corpus.add(
        "several pages", "pages.tif", saved(coffee, "TIFF", save_all=True, append_images=[coffee.rotate(180)]), picture(decoded)
    )
    several = saved(coffee, "MPO", save_all=True, append_images=[coffee.rotate(180)], quality=90)
    corpus.add("several pictures in a JPEG", "several.jpg", several, as_jpeg)
    _add_heic(corpus, coffee)


def _add_heic(corpus: Corpus, image: Image.Image) -> None:
    """Two of them if HEIC is read here: it is an extra."""
    try:
        import pillow_heif
    except ImportError:
        return
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=-1, chroma=444, matrix_coefficients=0)
    corpus.add("HEIC", "phone.heic", stream.getvalue(), picture(np.asarray(image), tolerance=2))
    corpus.add("HEIC called JPEG", "phone.jpg", stream.getvalue(), picture(np.asarray(image), tolerance=2))
    corpus.add("truncated HEIC", "cut.heic", stream.getvalue()[: len(stream.getvalue()) // 2], "it does not decode as a picture")
