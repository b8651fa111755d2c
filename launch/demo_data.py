"""The demo's data set: six short clips cut from real footage, two pictures, and a caption for each.

    .venv/bin/python launch/demo_data.py [FOLDER]

Files that are there already, captions too, are left as they are.  The exit code is 1 if the clips could not be had.
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

import assets

log = logging.getLogger("demo_data")


@dataclass(frozen=True)
class Cut:
    """Some frames of one shot, made small, at the rate of the source."""

    source: str
    first: int
    frames: int
    width: int
    height: int
    caption: str
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of the part that is used."""

    def pixels(self, frame: av.VideoFrame) -> Image.Image:
        return frame.to_image().resize((self.width, self.height), Image.Resampling.LANCZOS, box=self.box)

    def write(self, footage: Path, path: Path) -> None:
        """Decode, scale, and encode as H.264."""
        beside = path.with_name(f".{os.getpid()}.{path.name}")
        with av.open(footage / "clips" / self.source) as source, av.open(beside, "w", format="mp4") as out:
            rate = source.streams.video[0].average_rate
            stream = out.add_stream("libx264", rate=rate, options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
            for index, frame in enumerate(source.decode(video=0)):
                if index == self.first + self.frames:
                    break
                if index >= self.first:
                    small = av.VideoFrame.from_image(self.pixels(frame))
                    small.pts, small.time_base = index - self.first, 1 / rate
                    out.mux(stream.encode(small))
            out.mux(stream.encode())
        beside.replace(path)


@dataclass(frozen=True)
class Picture:
    """A picture as it is."""

    source: str
    caption: str

    def write(self, footage: Path, path: Path) -> None:
        assets.write_whole(path, (footage / "images" / self.source).read_bytes())


# 40 frames at 25 fps, like 48 at 30 fps, are 25 at Wan's 16 fps.  The pixels of the car's footage are not square (128:117); the
# cut's are.
CLIPS = {
    "cyclist_waits.mp4": Cut(
        *("bikes.mp4", 96, 40, 240, 102),
        "Cars rush past in a blur; behind a dark van, a cyclist in a helmet sits on his bicycle and waits at the roadside.",
    ),
    "street_behind_fence.mp4": Cut(
        *("bikes.mp4", 140, 40, 240, 102),
        "Cars drive along a wide city street lined with old brick houses; in front, a bicycle leans on a green metal fence.",
    ),
    "walking_past_bicycle.mp4": Cut(
        *("bikes.mp4", 190, 40, 240, 102),
        "A person in black trousers walks past an old bicycle that leans on a grey wall, on a cobbled pavement with a bollard.",
    ),
    "rabbit_gets_up.mp4": Cut(
        *("bigbuckbunny.mp4", 6, 40, 192, 108),
        "Animation: a big grey rabbit crawls out of his burrow in a grassy hill and stands up, stretching his arms.",
    ),
    "rabbit_yawns.mp4": Cut(
        *("bigbuckbunny.mp4", 84, 40, 192, 108),
        "Animation: a big grey rabbit stands on a green meadow, yawns with his arms stretched out, and puts a paw to his head.",
    ),
    "man_in_car.mp4": Cut(
        *("carphone_pristine.mp4", 24, 48, 140, 144),
        "A man with brown hair, in a dark suit and a red bow tie, talks to the camera in the back of a moving car.",
        box=(20, 0, 148, 144),
    ),
}
PICTURES = {
    "coffee.png": Picture("coffee.png", "A cup of espresso on a red saucer with a spoon, on a wooden table."),
    "rocket.jpg": Picture(
        "rocket.jpg", "A white rocket stands on its launch pad at dusk, between tall lattice towers, lit by floodlights."
    ),
}


def prepare(folder: Path, footage: Path = assets.DEFAULT_FOLDER) -> dict[str, str]:
    """Write what is not in the folder yet; returns what could not be had (``clips``, ``images``) -> the reason."""
    missing: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for what, items in {"clips": CLIPS, "images": PICTURES}.items():
        absent = {folder / name: item for name, item in items.items() if not (folder / name).exists()}
        if absent:
            missing |= assets.fetch(footage, (what,))
        if what in missing:
            continue
        for path, item in absent.items():
            item.write(footage, path)
        for name, item in items.items():
            caption = (folder / name).with_suffix(".txt")
            if not caption.exists():
                assets.write_whole(caption, f"{item.caption}\n".encode())
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/clips"), help="default: %(default)s")
    arguments = parser.parse_args()
    missing = prepare(arguments.folder)
    for what, reason in missing.items():
        log.info("The demo's %s %s", what, reason)
    return 1 if "clips" in missing else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
