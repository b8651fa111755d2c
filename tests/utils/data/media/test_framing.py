"""What is cut off and where, in numbers, and in pixels against crops made by hand: of items, masks, control pictures."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests.utils.data.corpus_clips import at_16_fps, encode, real_frames, stored_frames
from utils.data.media.files import DataFile
from utils.data.media.framing import FramingError, enlargement, framing_for
from utils.data.media.pixels import Covering, MediaError, covering, cropped_share, load_alpha_mask, load_mask, load_pixels
from utils.data.values import CENTRE, Bucket, Framing

LANCZOS = Image.Resampling.LANCZOS
SIDES = st.integers(1, 5000)


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def test_covering_tells_what_is_scaled_and_cut():
    assert covering((640, 480), (64, 64)) == Covering(width=85, height=64, left=10, top=0)
    assert covering((30, 90), (32, 32)) == Covering(width=32, height=96, left=0, top=32)
    assert covering((64, 32), (64, 32)) == Covering(width=64, height=32, left=0, top=0)


def test_places_of_what_stays():
    for x, left in ((0.0, 0), (0.25, 5), (0.5, 10), (1.0, 21)):
        assert covering((640, 480), (64, 64), Framing(x=x, y=0.9)) == Covering(85, 64, left, 0)
    for y, top in ((0.0, 0), (0.5, 32), (1.0, 64)):
        assert covering((30, 90), (32, 32), Framing(x=0.1, y=y)) == Covering(32, 96, 0, top)


def test_a_box_is_scaled_as_a_picture_of_its_own():
    framing = Framing(box=(100, 40, 420, 280), x=1.0)
    cover = covering((640, 480), (64, 64), framing)
    assert cover == Covering(85, 64, 21, 0, box=(100, 40, 420, 280))
    # The whole picture scaled likewise would be 170x128; the box begins at 26.6 x 10.7 of it.
    assert cover.corner((640, 480)) == (27 + 21, 11)
    assert covering((640, 480), (64, 64)).corner((640, 480)) == (10, 0)
    assert enlargement((640, 480), (64, 64), framing) == pytest.approx(64 / 240)


def test_shares_and_enlargements():
    assert cropped_share((640, 480), (64, 48)) == 0
    assert cropped_share((640, 480), (48, 48)) == pytest.approx(0.25)
    assert cropped_share((640, 480), (64, 48), Framing(box=(0, 0, 320, 240))) == pytest.approx(0.75)
    assert enlargement((640, 480), (640, 240)) == 1
    assert enlargement((640, 480), (320, 480)) == 1
    assert enlargement((640, 480), (320, 960)) == 2
    assert enlargement((640, 480), (320, 240), Framing(box=(0, 0, 80, 480))) == 4


@pytest.mark.parametrize("box", [(0, 0, 641, 480), (-1, 0, 10, 10), (10, 10, 10, 20), (20, 10, 10, 20), (0, 470, 10, 481)])
def test_a_box_outside_the_picture_is_refused(assets, box):
    text = f"the box {list(box)} is no part of the 640x480 pixels that it has"
    for function in (covering, cropped_share, enlargement):
        with pytest.raises(FramingError) as raised:
            function((640, 480), (64, 64), Framing(box=box))
        assert str(raised.value).startswith(text)
    with pytest.raises(MediaError, match=r"rocket\.jpg: the box .* is no part of the 640x427 pixels that it has; a box is \[left"):
        load_pixels(DataFile(assets.images["rocket.jpg"]), Bucket(64, 64, 1), framing=Framing(box=box))


@given(size=st.tuples(SIDES, SIDES), target=st.tuples(SIDES, SIDES), x=st.floats(0, 1), y=st.floats(0, 1))
@example(size=(1, 5000), target=(5000, 1), x=1.0, y=1.0)
def test_what_is_cut_out_lies_in_what_is_scaled(size, target, x, y):
    cover = covering(size, target, Framing(x=x, y=y))
    assert 0 <= cover.left <= cover.width - target[0]
    assert 0 <= cover.top <= cover.height - target[1]
    assert cover.width == target[0] or cover.height == target[1]
    assert -1e-9 <= cropped_share(size, target, Framing(x=x, y=y)) < 1


@given(size=st.tuples(SIDES, SIDES), item=st.tuples(SIDES, SIDES), data=st.data())
def test_a_box_stays_a_box_in_another_picture(size, item, data):
    left, top = data.draw(st.integers(0, item[0] - 1)), data.draw(st.integers(0, item[1] - 1))
    right, bottom = data.draw(st.integers(left + 1, item[0])), data.draw(st.integers(top + 1, item[1]))
    framing = Framing((left, top, right, bottom), 0.3, 0.7)
    mapped = framing_for(size, item, framing)
    covering(size, (16, 16), mapped)  # raises if it is no part of it
    assert (mapped.x, mapped.y) == (0.3, 0.7)
    assert framing_for(item, item, framing) == framing
    for side, whole, before, after in zip(size * 2, item * 2, framing.box, mapped.box, strict=True):
        assert abs(after - before * side / whole) <= 1.5  # rounded, and one pixel at least


# ── pixels ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

FRAMINGS = [CENTRE, Framing(x=0.0, y=1.0), Framing(box=(31, 17, 371, 257)), Framing(box=(31, 17, 131, 297), x=0.2, y=0.9)]


def by_hand(image: Image.Image, size: tuple[int, int], framing: Framing) -> np.ndarray:
    """Crop to the box, scale to cover, crop: with Pillow alone."""
    image = image.crop(framing.box or (0, 0, *image.size))
    ratio = max(Fraction(size[0], image.width), Fraction(size[1], image.height))
    scaled = image.resize((max(size[0], round(image.width * ratio)), max(size[1], round(image.height * ratio))), LANCZOS)
    left, top = int((scaled.width - size[0]) * framing.x), int((scaled.height - size[1]) * framing.y)
    return np.asarray(scaled.crop((left, top, left + size[0], top + size[1])))


@pytest.mark.parametrize(("framing", "size"), itertools.product(FRAMINGS, [(128, 96), (64, 160), (640, 448)]))
def test_pictures_are_framed(assets, framing: Framing, size: tuple[int, int]):
    with Image.open(assets.images["coffee.png"]) as image:
        expected = by_hand(image.convert("RGB"), size, framing)
    pixels = load_pixels(DataFile(assets.images["coffee.png"]), Bucket(*size, 1), framing=framing)
    np.testing.assert_array_equal(to_bytes(pixels)[0], expected)


@pytest.mark.parametrize("fps", [16, 24])
@pytest.mark.parametrize(("name", "source"), [("bikes.mp4", Fraction(25)), ("carphone_distorted.mp4", Fraction(30000, 1001))])
def test_clips_are_framed_and_resampled(assets, name: str, source: Fraction, fps: int):
    """From 25 and 29.97 frames per second to 16 and 24, from the beginning and from later."""
    frames = stored_frames(assets.clips[name])
    if name != "bikes.mp4":
        frames = [np.asarray(Image.fromarray(frame).resize((193, 144), LANCZOS)) for frame in frames]
    framing = Framing(box=(20, 10, 180, 140), x=1.0, y=0.25)
    for first in (0, 13):
        # The source frame nearest to each time, of two equally near the earlier.
        times = [Fraction(first + i, fps) for i in range(9)]
        nearest = [min(range(len(frames)), key=lambda index: (abs(index / source - time), index)) for time in times]
        expected = [by_hand(Image.fromarray(frames[index]), (64, 96), framing) for index in nearest]
        pixels = load_pixels(DataFile(assets.clips[name]), Bucket(64, 96, 9), float(fps), first, framing=framing)
        np.testing.assert_array_equal(to_bytes(pixels), np.stack(expected))


@pytest.mark.parametrize("framing", FRAMINGS)
def test_masks_and_controls_are_framed_as_their_items(assets, tmp_path: Path, framing: Framing):
    """A mask and a control picture of half the item's size, and the box with them."""
    half = {"camera.png": "L", "rocket.jpg": "RGB"}
    for name, mode in half.items():
        with Image.open(assets.images[name]) as image:
            small = image.convert(mode).resize((300, 200))
        small.info = {}
        small.save(tmp_path / Path(name).with_suffix(".png").name)
    box = framing.box and tuple(round(side / 2) for side in framing.box)
    own = Framing(box, framing.x, framing.y)
    bucket, item = Bucket(96, 128, 1), (600, 400)
    with Image.open(tmp_path / "camera.png") as mask, Image.open(tmp_path / "rocket.png") as control:
        expected_mask, expected_control = by_hand(mask, (96, 128), own), by_hand(control, (96, 128), own)
    found = load_mask(DataFile(tmp_path / "camera.png"), bucket, framing=framing, item_size=item)
    assert (found.shape, found.dtype) == ((1, 1, 128, 96), torch.float32)
    np.testing.assert_array_equal((found[0, 0] * 255).round().numpy(), expected_mask)
    pixels = load_pixels(DataFile(tmp_path / "rocket.png"), bucket, framing=framing, item_size=item)
    np.testing.assert_array_equal(to_bytes(pixels)[0], expected_control)


def test_a_picture_masks_all_frames_and_a_clip_each_its_own(assets, tmp_path: Path):
    frames = real_frames(assets.clips["bikes.mp4"], 30)
    clip = encode(tmp_path / "mask.mkv", frames, codec="ffv1", pixels="gray")
    bucket, framing = Bucket(80, 64, 9), Framing(x=0.0)
    found = load_mask(DataFile(clip), bucket, 16.0, 3, framing)
    grey = [Image.fromarray(frame).convert("L") for frame in stored_frames(clip)]
    expected = [by_hand(grey[index], (80, 64), framing) for index in at_16_fps(9, first=3)]
    np.testing.assert_array_equal((found[0] * 255).round().numpy(), np.stack(expected))
    assert found.is_contiguous()

    grey[0].save(tmp_path / "mask.png")
    found = load_mask(DataFile(tmp_path / "mask.png"), bucket, 16.0, 3, framing)
    assert found.shape == (1, 9, 64, 80)
    np.testing.assert_array_equal((found[0] * 255).round().numpy(), np.stack([by_hand(grey[0], (80, 64), framing)] * 9))


def test_masks_are_numbers_not_colours(assets, tmp_path: Path):
    """No profile changes them; what is transparent does not count; of 16 bits the upper ones; colours by their brightness."""
    values = np.asarray(Image.open(assets.images["camera.png"]).resize((64, 64)))
    profile = Image.open(assets.images["rocket.jpg"]).info["icc_profile"]
    Image.fromarray(values).save(tmp_path / "grey.png", icc_profile=profile)
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(np.stack([values] * 3, axis=-1)).save(tmp_path / "colour.png")
    for name in ("grey.png", "grey16.png", "colour.png"):
        found = load_mask(DataFile(tmp_path / name), Bucket(64, 64, 1))
        np.testing.assert_array_equal((found[0, 0] * 255).round().numpy(), values)
    shape = Image.new("RGBA", (64, 64), "white")
    shape.putalpha(Image.fromarray(values))
    shape.save(tmp_path / "shape.png")
    found = load_mask(DataFile(tmp_path / "shape.png"), Bucket(64, 64, 1))
    np.testing.assert_array_equal((found[0, 0] * 255).round().numpy(), values)


def test_alpha_is_a_mask(assets, tmp_path: Path):
    with Image.open(assets.images["horse.png"]) as horse:
        alpha = horse.getchannel("A")
    framing = Framing(x=0.0)
    found = load_alpha_mask(DataFile(assets.images["horse.png"]), Bucket(96, 96, 1), framing=framing)
    np.testing.assert_array_equal((found[0, 0] * 255).round().numpy(), by_hand(alpha, (96, 96), framing))
    opaque = load_alpha_mask(DataFile(assets.images["coffee.png"]), Bucket(96, 96, 1), framing=framing)
    assert torch.equal(opaque, torch.ones(1, 1, 96, 96))

    frames = real_frames(assets.clips["bikes.mp4"], 12)
    shares = [np.full((68, 160, 1), 20 * index, np.uint8) for index in range(12)]
    path = tmp_path / "alpha.mov"
    encode(path, [np.concatenate(both, axis=-1) for both in zip(frames, shares, strict=True)], codec="png", pixels="rgba")
    found = load_alpha_mask(DataFile(path), Bucket(160, 64, 5), 16.0)
    assert (found * 255).round().amax(dim=(0, 2, 3)).tolist() == [20 * index for index in at_16_fps(5)]
    assert torch.equal(found.amin(dim=(0, 2, 3)), found.amax(dim=(0, 2, 3)))
