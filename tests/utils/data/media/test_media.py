"""Frames, scaling and cropping against references made by hand with PyAV and Pillow; files that are broken in many ways."""

import math
import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.data.media.files import DataFile
from utils.data.media.pixels import MediaError, MediaInfo, frames_at, load_pixels, probe
from utils.data.values import Bucket


def all_frames(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def nearest_indices(count: int, source_fps: Fraction, fps: int, start: Fraction = Fraction(0)) -> list[int]:
    """Source frame nearest to each time, half way between two the earlier; in whole numbers."""
    return [math.ceil((start + Fraction(i, fps)) * source_fps - Fraction(1, 2)) for i in range(count)]


# ── size and length ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_probe_of_real_clips(assets):
    assert probe(DataFile(assets.clips["bikes.mp4"])) == MediaInfo(640, 272, frames=250, fps=25.0)
    assert probe(DataFile(assets.clips["bigbuckbunny.mp4"])) == MediaInfo(1280, 720, frames=132, fps=25.0)
    # Stored as 176x144 with pixels of 128:117, so displayed 193 wide.
    assert probe(DataFile(assets.clips["carphone_pristine.mp4"])) == MediaInfo(193, 144, frames=120, fps=30000 / 1001)


def test_probe_of_pictures(assets):
    assert probe(DataFile(assets.images["astronaut.png"])) == MediaInfo(512, 512, frames=1, fps=None)
    assert probe(DataFile(assets.images["rocket.jpg"])) == MediaInfo(640, 427, frames=1, fps=None)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "libx264"), ("a.mov", "libx264")]
)
def test_frames_are_counted_where_the_header_does_not_say(write_clip, name: str, codec: str):
    info = probe(DataFile(write_clip(name, codec=codec, frames=37)))
    assert (info.frames, info.width, info.height) == (37, 320, 136)
    assert info.fps == pytest.approx(25, rel=1e-3)


@settings(deadline=None)
@given(
    frames=st.integers(1, 300),
    fps=st.sampled_from([8, 16, 24, 30]),
    source=st.sampled_from([Fraction(30000, 1001), 8, 15, 16, 25, 60]),
)
def test_frames_at_counts_the_targets_that_have_a_nearest_frame(frames: int, fps: int, source: Fraction):
    number = frames_at(MediaInfo(16, 16, frames, float(source)), float(fps))
    targets = nearest_indices(number + 1, Fraction(source), fps)
    # The target after the last lies past the last frame, or exactly half a frame behind it.
    assert targets[number - 1] <= frames - 1
    assert Fraction(number, fps) * source >= frames - 1 + Fraction(1, 2)


# ── clips ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_clip_from_25_to_16_fps(assets):
    path = assets.clips["bikes.mp4"]
    sources = all_frames(path)
    pixels = load_pixels(DataFile(path), Bucket(256, 144, 33), 16.0)
    # 640x272 covers 256x144 when scaled by 144/272: to 339x144, of which 41 columns are cut on the left.
    expected = [
        sources[index].resize((339, 144), Image.Resampling.LANCZOS).crop((41, 0, 297, 144))
        for index in nearest_indices(33, Fraction(25), 16)
    ]
    assert nearest_indices(10, Fraction(25), 16) == [0, 2, 3, 5, 6, 8, 9, 11, 12, 14]
    np.testing.assert_array_equal(to_bytes(pixels), np.stack(expected))
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_clip_from_30000_1001_to_16_fps_with_pixels_that_are_not_square(assets):
    path = assets.clips["carphone_pristine.mp4"]
    sources = [image.resize((193, 144), Image.Resampling.LANCZOS) for image in all_frames(path)]
    pixels = load_pixels(DataFile(path), Bucket(96, 96, 61), 16.0)
    expected = [
        sources[index].resize((129, 96), Image.Resampling.LANCZOS).crop((16, 0, 112, 96))
        for index in nearest_indices(61, Fraction(30000, 1001), 16)
    ]
    np.testing.assert_array_equal(to_bytes(pixels), np.stack(expected))


def test_a_later_part_of_a_clip(assets):
    path = assets.clips["bikes.mp4"]
    sources = all_frames(path)
    pixels = load_pixels(DataFile(path), Bucket(64, 32, 33), 16.0, first_frame=63)
    # The first target is at 63/16 s, nearest to frame 98.
    indices = nearest_indices(33, Fraction(25), 16, start=Fraction(63, 16))
    assert (indices[0], indices[-1]) == (98, 148)
    expected = [sources[index].resize((75, 32), Image.Resampling.LANCZOS).crop((5, 0, 69, 32)) for index in indices]
    np.testing.assert_array_equal(to_bytes(pixels), np.stack(expected))


def test_a_slower_clip_shows_frames_more_than_once(assets):
    pixels = load_pixels(DataFile(assets.clips["bikes.mp4"]), Bucket(48, 32, 9), 50.0)
    source = load_pixels(DataFile(assets.clips["bikes.mp4"]), Bucket(48, 32, 5), 25.0)
    torch.testing.assert_close(pixels, source[:, [0, 0, 1, 1, 2, 2, 3, 3, 4]], rtol=0, atol=0)


def test_uneven_times_are_followed(write_clip):
    """Frames 20 and later are shown 0.4 s later than they would be at 25 fps: frame 19 stands still for that time."""
    path = write_clip("uneven.mkv", shown_at=lambda index: index + (10 if index >= 20 else 0))
    pixels = load_pixels(DataFile(path), Bucket(80, 32, 33), 25.0)
    # From 0.76 s to 1.2 s: half of the gap belongs to each side.
    indices = [*range(20), *[19] * 5, *[20] * 5, *range(20, 40)][:33]
    sources = all_frames(path)
    expected = [sources[index].resize((80, 34), Image.Resampling.LANCZOS).crop((0, 1, 80, 33)) for index in indices]
    np.testing.assert_array_equal(to_bytes(pixels), np.stack(expected))


def test_avi_with_b_frames_is_in_order(write_clip):
    """ffmpeg decodes such a file in the right order, and reports its times in the order of decoding."""
    path = write_clip("a.avi", options={"bf": "3"})
    with av.open(str(path)) as container:
        times = [frame.pts for frame in container.decode(video=0)]
    assert times != sorted(times)
    sources = all_frames(path)
    for first in (0, 8):
        pixels = load_pixels(DataFile(path), Bucket(320, 128, 9), 16.0, first)
        expected = [sources[index].crop((0, 4, 320, 132)) for index in nearest_indices(9, Fraction(25), 16, Fraction(first, 16))]
        np.testing.assert_array_equal(to_bytes(pixels), np.stack(expected))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx"),
        ("a.mov", "libx264"),
        ("a.flv", "flv"),
        ("a.mpg", "mpeg2video"),
        ("a.wmv", "wmv2"),
    ],
)
def test_a_later_part_in_other_containers(write_clip, name: str, codec: str):
    """ffmpeg's seeking is not equally good in all of them: in ``.mpg`` it lands behind the time that was asked for."""
    path = write_clip(name, frames=60, codec=codec, options={"g": "12"})
    sources = all_frames(path)
    indices = nearest_indices(17, Fraction(25), 16, start=Fraction(11, 16))
    pixels = load_pixels(DataFile(path), Bucket(320, 128, 17), 16.0, first_frame=11)
    np.testing.assert_array_equal(to_bytes(pixels), np.stack([sources[index].crop((0, 4, 320, 132)) for index in indices]))


@pytest.mark.parametrize("mirror", [{}, {"hflip": True}])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_clips_are_turned_upright(write_clip, degrees: int, mirror: dict[str, bool]):
    path = write_clip("turned.mp4", frames=5, prepare=lambda stream: stream.set_display_rotation(degrees, **mirror))
    upright = all_frames(path)[0].rotate(degrees, expand=True)  # counter-clockwise for both
    if mirror:
        upright = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    info = probe(DataFile(path))
    assert (info.width, info.height) == upright.size
    pixels = load_pixels(DataFile(path), Bucket(*upright.size, 1), 25.0)
    np.testing.assert_array_equal(to_bytes(pixels)[0], np.asarray(upright))


def damaged(path: Path, start: float, stop: float) -> Path:
    """A copy with zeros from one part of the file to another."""
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = bytes(last - first)
    copy = path.with_name(f"damaged_{path.name}")
    copy.write_bytes(data)
    return copy


def test_frames_behind_the_last_one_needed_are_not_decoded(write_clip):
    path = write_clip("a.mp4", frames=200, options={"g": "10"})
    broken = damaged(path, 0.8, 0.85)
    bucket = Bucket(64, 32, 33)
    assert torch.equal(*[load_pixels(DataFile(file), bucket, 16.0) for file in (path, broken)])
    with pytest.raises(MediaError, match=r"damaged_a\.mp4: it does not decode"):
        load_pixels(DataFile(broken), Bucket(64, 32, 125), 16.0)
    # Nor behind the last one that is asked for.
    whole = load_pixels(DataFile(path), Bucket(64, 32, 125), 16.0)
    assert torch.equal(load_pixels(DataFile(broken), Bucket(64, 32, 125), 16.0, 0, max_frames=2), whole[:, :2])


def test_the_first_frame_is_that_of_the_whole_clip(assets):
    file, bucket = DataFile(assets.clips["bikes.mp4"]), Bucket(64, 32, 33)
    for first in (0, 63):
        assert torch.equal(load_pixels(file, bucket, 16.0, first, max_frames=1), load_pixels(file, bucket, 16.0, first)[:, :1])
    assert load_pixels(DataFile(assets.images["rocket.jpg"]), Bucket(64, 64, 1), None, 0, max_frames=1).shape[1] == 1


def test_frames_long_before_the_middle_are_not_decoded(write_clip):
    path = write_clip("a.mp4", frames=200, options={"g": "10"})
    bucket = Bucket(64, 32, 33)
    files = (path, damaged(path, 0.1, 0.15))
    assert torch.equal(*[load_pixels(DataFile(file), bucket, 16.0, first_frame=63) for file in files])


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_picture_is_scaled_and_cropped(assets):
    pixels = load_pixels(DataFile(assets.images["coffee.png"]), Bucket(256, 256, 1))
    # 600x400 covers 256x256 when scaled by 256/400: to 384x256.
    with Image.open(assets.images["coffee.png"]) as image:
        expected = image.convert("RGB").resize((384, 256), Image.Resampling.LANCZOS).crop((64, 0, 320, 256))
    assert pixels.shape == (3, 1, 256, 256)
    np.testing.assert_array_equal(to_bytes(pixels)[0], np.asarray(expected))


def test_picture_is_turned_as_its_exif_says(assets, tmp_path: Path):
    with Image.open(assets.images["astronaut.png"]) as image:
        image = image.convert("RGB").crop((0, 0, 320, 192))
    stored = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    stored.save(tmp_path / "turned.png", exif=exif)
    assert probe(DataFile(tmp_path / "turned.png")) == MediaInfo(320, 192, 1, None)
    pixels = load_pixels(DataFile(tmp_path / "turned.png"), Bucket(320, 192, 1))
    np.testing.assert_array_equal(to_bytes(pixels)[0], np.asarray(image))


def test_transparent_parts_become_white(assets, tmp_path: Path):
    with Image.open(assets.images["chelsea.png"]) as image:
        image = image.convert("RGBA").resize((64, 48))
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 32:] = 255
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "half.png")
    pixels = to_bytes(load_pixels(DataFile(tmp_path / "half.png"), Bucket(64, 48, 1)))[0]
    assert (pixels[:, :32] == 255).all()
    np.testing.assert_array_equal(pixels[:, 32:], np.asarray(image.convert("RGB"))[:, 32:])


def test_grey_and_16_bit_pictures(assets, tmp_path: Path):
    with Image.open(assets.images["camera.png"]) as image:
        grey = np.asarray(image.convert("L").resize((64, 64)))
    Image.fromarray(grey).save(tmp_path / "grey8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for name in ("grey8.png", "grey16.png"):
        pixels = to_bytes(load_pixels(DataFile(tmp_path / name), Bucket(64, 64, 1)))[0]
        np.testing.assert_array_equal(pixels, np.stack([grey] * 3, axis=-1))


# ── broken files ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def broken_file(kind: str, assets, write_clip, folder: Path) -> Path:
    clip, picture = assets.clips["bikes.mp4"].read_bytes(), assets.images["coffee.png"].read_bytes()
    contents = {
        "cut.mp4": lambda: clip[: len(clip) // 2],
        "empty.mp4": lambda: b"",
        "text.mp4": lambda: b"this is no clip\n" * 50,
        "picture.mp4": lambda: b"\x00" * 5000,
        "cut.png": lambda: picture[: len(picture) // 2],
        "empty.png": lambda: b"",
        "text.png": lambda: b"this is no picture\n" * 50,
        "cut_with_header.mp4": lambda: write_clip("whole.mp4", container_options={"movflags": "faststart"}).read_bytes()[:-9000],
    }
    path = folder / kind
    path.write_bytes(contents[kind]())
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut.mp4", "it does not decode (Invalid data found when processing input): it is cut off, damaged, or no clip"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "it does not decode (Invalid data found when processing input): it is cut off, damaged, or no clip"),
        ("picture.mp4", "it does not decode (Invalid data found when processing input): it is cut off, damaged, or no clip"),
        ("cut_with_header.mp4", "it is cut off or damaged: frame "),
        ("cut.png", "it does not decode as a picture (OSError: "),
        ("empty.png", "the file is empty"),
        ("text.png", "it is no picture that is read"),
    ],
)
def test_broken_files_are_named_with_the_reason(assets, write_clip, tmp_path: Path, kind: str, reason: str):
    path = broken_file(kind, assets, write_clip, tmp_path)
    for attempt in (probe, lambda file: load_pixels(file, Bucket(64, 64, 1), 16.0)):
        with pytest.raises(MediaError) as raised:
            attempt(DataFile(path))
        assert str(raised.value).startswith(f"{path}: {reason}")


def test_a_file_without_pictures(tmp_path: Path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        target.mux(stream.encode(frame))
        target.mux(stream.encode())
    with pytest.raises(MediaError, match=r"sound\.mp4: it has no video stream"):
        probe(DataFile(path))


def test_a_clip_that_is_too_short(assets):
    with pytest.raises(MediaError, match=r"bikes\.mp4: only 161 of the 201 frames that are needed decode"):
        load_pixels(DataFile(assets.clips["bikes.mp4"]), Bucket(32, 32, 201), 16.0)


def test_a_file_that_went_away(tmp_path: Path):
    with pytest.raises(MediaError, match=r"gone\.mp4: it cannot be read \(No such file or directory\)"):
        probe(DataFile(tmp_path / "gone.mp4"))


def test_the_error_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(MediaError(DataFile(Path("a.mp4")), "the file is empty")))
    assert (error.file, error.reason, str(error)) == (DataFile(Path("a.mp4")), "the file is empty", "a.mp4: the file is empty")
