"""One process of the benchmark of decoding: ``python -m tests.perf.data_worker CLIPS IMAGES OUT``.

Takes the same samples through ``load_pixels`` and, if it is alone, through a plain loop over PyAV and Pillow, in turn, and writes
how long each round took to ``OUT/rank-N.json``.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from utils.data.media import clips
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Bucket

ROUNDS = 5
FPS = 16.0


@dataclass(frozen=True)
class Work:
    """Samples of one bucket."""

    bucket: Bucket
    samples: list[tuple[Path, int]]
    """Each with the frame at which it begins."""


def work(clips_folder: Path, images: Path) -> list[Work]:
    """Clips of several sizes, parts of one from its middle, and pictures in sRGB."""
    bikes, rabbit, phone = (clips_folder / name for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"))
    pictures = [images / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg")]
    return [
        Work(Bucket(416, 240, 33), [(bikes, 0), (bikes, 63), (rabbit, 0), (rabbit, 40)]),
        Work(Bucket(144, 112, 33), [(phone, 0), (phone, 20)]),
        Work(Bucket(512, 512, 1), [(picture, 0) for picture in pictures]),
    ]


def ours(part: Work) -> torch.Tensor:
    return torch.stack(
        [load_pixels(DataFile(path), part.bucket, FPS if part.bucket.frames > 1 else None, first) for path, first in part.samples]
    )


def plain(part: Work) -> torch.Tensor:
    size = (part.bucket.width, part.bucket.height)
    batch = []
    for path, first in part.samples:
        images = plain_clip(path, first, part.bucket.frames) if part.bucket.frames > 1 else [Image.open(path).convert("RGB")]
        fitted: dict[int, np.ndarray] = {}
        for image in images:
            if id(image) not in fitted:
                fitted[id(image)] = plain_crop(image, size)
        frames = np.stack([fitted[id(image)] for image in images])
        batch.append(torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1.0))
    return torch.stack(batch)


def plain_crop(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size[0], top + size[1])))


def plain_clip(path: Path, first: int, number: int) -> list[Image.Image]:
    """The frames at 16 fps of a clip whose frames are evenly spaced, decoded from the key frame before the first."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, aspect = stream.average_rate, stream.sample_aspect_ratio or 1
        wanted = [math.ceil(Fraction(first + i) / Fraction(FPS) * rate - Fraction(1, 2)) for i in range(number)]
        if first:
            container.seek(int(wanted[0] / rate / stream.time_base), stream=stream)
        images: dict[int, Image.Image] = {}
        for frame in container.decode(stream):
            index = round(frame.pts * stream.time_base * rate)
            if index in wanted:
                image = frame.to_image()
                if aspect != 1:
                    image = image.resize((round(image.width * aspect), image.height), Image.Resampling.LANCZOS)
                images[index] = image
            if index >= wanted[-1]:
                break
        return [images[index] for index in wanted]


def seconds(load, parts: list[Work]) -> float:
    clips.forget_looks()
    started = time.perf_counter()
    for part in parts:
        load(part)
    return time.perf_counter() - started


def wait_for_all(out: Path) -> None:
    """Until each process has come here."""
    (out / f"ready-{os.environ['RANK']}").touch()
    while len(list(out.glob("ready-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def main() -> None:
    clips_folder, images, out = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    parts = work(clips_folder, images)
    for part in parts:
        torch.testing.assert_close(ours(part), plain(part), rtol=0, atol=1e-6)
    alone = int(os.environ["WORLD_SIZE"]) == 1
    wait_for_all(out)
    times = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        times["ours"].append(seconds(ours, parts))
        if alone:
            times["plain"].append(seconds(plain, parts))
    samples = sum(len(part.samples) for part in parts)
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({**times, "samples": samples}))


if __name__ == "__main__":
    main()
