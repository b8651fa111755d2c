"""Masks in the cache: means of pixels, only of samples that have one, framed as the sample is."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.data.encode_worker import Bytes
from utils.data.cache import DatasetCache
from utils.data.masks import MaskEncoder
from utils.data.media.files import DataFile, content_of
from utils.data.media.pixels import load_alpha_mask, load_mask
from utils.data.values import Bucket, Control, Framing, Sample

CPU = torch.device("cpu")


def looked_at(path: Path) -> Control:
    return Control(DataFile(path), content_of(DataFile(path)))


@pytest.fixture
def samples(assets, tmp_path: Path) -> dict[str, Sample]:
    """A picture without a mask, one with a mask of a box, one with an alpha channel, and a clip with a mask."""
    found = {}
    for name in ("astronaut.png", "bikes.mp4"):
        shutil.copy({**assets.images, **assets.clips}[name], tmp_path / name)
        file = looked_at(tmp_path / name)
        clip = name.endswith("mp4")
        size = (640, 272) if clip else (512, 512)
        bucket = Bucket(64, 48, 9 if clip else 1)
        found[name] = Sample(name, file.file, file.content, name, bucket, fps=16.0 if clip else None, original_size=size)
    rows, columns = np.mgrid[:512, :512]
    alpha = np.where((rows - 200) ** 2 + (columns - 300) ** 2 < 150**2, 255, 0).astype(np.uint8)
    with Image.open(assets.images["astronaut.png"]) as picture:
        seen = picture.convert("RGB")
    seen.putalpha(Image.fromarray(alpha))
    seen.save(tmp_path / "seen.png")
    seen = looked_at(tmp_path / "seen.png")
    levels = np.zeros((512, 512), np.uint8)
    levels[100:300, 200:400] = 255
    levels[300:400, 200:400] = 128
    Image.fromarray(levels).save(tmp_path / "box.png")
    Image.fromarray(levels).resize((640, 272)).save(tmp_path / "box_of_clip.png")
    plain = found["astronaut.png"]
    return {
        "plain": plain,
        "masked": replace(plain, key="masked", mask=looked_at(tmp_path / "box.png")),
        "framed": replace(plain, key="framed", mask=looked_at(tmp_path / "box.png"), framing=Framing((150, 80, 470, 400))),
        "alpha": replace(plain, key="alpha", file=seen.file, content=seen.content, alpha_mask=True),
        "clip": replace(found["bikes.mp4"], mask=looked_at(tmp_path / "box_of_clip.png")),
    }


def test_masks_are_means_of_their_pixels(samples, tmp_path):
    encoders = [Bytes(), MaskEncoder()]
    cache = DatasetCache(tmp_path / "cache")
    report = cache.build(list(samples.values()), encoders, device=CPU, batch_size=2)
    assert [part.encoded for part in report.encoders] == [2, 4]
    found = {name: cache.read(sample, encoders) for name, sample in samples.items()}
    assert found["plain"].keys() == {"text"}
    for name in ("masked", "framed", "alpha", "clip"):
        sample = samples[name]
        how = (sample.bucket, sample.fps, 0, sample.framing)
        mask = load_mask(sample.mask.file, *how) if sample.mask else load_alpha_mask(sample.file, *how)
        frames, rows, columns = sample.bucket.frames, sample.bucket.height // 8, sample.bucket.width // 8
        assert found[name]["mask"].dtype is torch.float32
        assert found[name]["mask"].shape == (frames, rows, columns)
        for row in range(rows):
            for column in range(columns):
                square = mask[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                torch.testing.assert_close(found[name]["mask"][:, row, column], square.mean((1, 2)))
        values = found[name]["mask"]
        assert values.min() < 0.01
        assert values.max() > 0.99
    assert not torch.equal(found["masked"]["mask"], found["framed"]["mask"])


def test_a_mask_of_another_size_is_framed_as_its_picture(samples, tmp_path):
    """Half as large as the picture, with a box of the picture."""
    framed = samples["framed"]
    with Image.open(framed.mask.file.path) as mask:
        mask.reduce(2).save(tmp_path / "small.png")
    half = replace(framed, mask=looked_at(tmp_path / "small.png"))
    cache, encoders = DatasetCache(tmp_path / "cache"), [MaskEncoder()]
    cache.build([framed, half], encoders, device=CPU)
    whole, small = (cache.read(sample, encoders)["mask"] for sample in (framed, half))
    torch.testing.assert_close(whole, small, rtol=0, atol=0.03)
