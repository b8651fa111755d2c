"""Folders of real pictures and clips, and clips made of real frames with properties that the originals lack."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import pytest
from PIL import Image

CAPTIONS = {
    "bikes.mp4": "people on bikes in a city",
    "carphone_pristine.mp4": "a man talks in a car",
    "astronaut.png": "a portrait of an astronaut",
    "coffee.png": "a cup of coffee on a table",
}


@pytest.fixture
def mixed(assets, tmp_path: Path) -> Path:
    """A folder with two clips and two pictures, captioned."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        shutil.copy({**assets.clips, **assets.images}[name], folder)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


@dataclass(frozen=True)
class ClipWriter:
    """Encodes the first frames of a real clip anew.  (The encoder does not always write the same bytes.)"""

    source: Path
    folder: Path

    def __call__(
        self,
        name: str,
        *,
        frames: int = 40,
        codec: str = "libx264",
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
        shown_at: Callable[[int], int] = lambda index: index,
        prepare: Callable[[av.VideoStream], None] = lambda stream: None,
    ) -> Path:
        """320x136, frame ``i`` shown at ``shown_at(i) / 25`` seconds; ``prepare`` may change the stream before the first frame."""
        path = self.folder / name
        with av.open(str(self.source)) as source, av.open(str(path), "w", options=container_options or {}) as target:
            stream = target.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height, stream.pix_fmt = 320, 136, "yuv420p"
            prepare(stream)
            for index, frame in zip(range(frames), source.decode(video=0), strict=False):
                frame = frame.reformat(320, 136, "yuv420p")
                frame.pts, frame.time_base = shown_at(index), Fraction(1, 25)
                target.mux(stream.encode(frame))
            target.mux(stream.encode())
        return path


@pytest.fixture
def write_clip(assets, tmp_path: Path) -> ClipWriter:
    return ClipWriter(assets.clips["bikes.mp4"], tmp_path)


@pytest.fixture
def small(assets, tmp_path: Path):
    """Writes small real pictures, each of other bytes, with a caption beside it if there is one."""
    with Image.open(assets.images["coffee.png"]) as opened:
        whole = opened.convert("RGB")

    def write(path: Path, caption: str | None = None, size: tuple[int, int] = (80, 64)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        left, top = (random.Random(path.name).randrange(100) for _ in range(2))
        whole.crop((left, top, left + size[0], top + size[1])).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
        return path

    return write
