"""Awkward inputs, as people's folders have them: real pictures and clips in unusual, misleading and broken files.

:func:`awkward_inputs` writes them; each says what must come of it.  What is usable has reference pixels that were made by hand (by
numpy, or a plain loop over Pillow or PyAV), the rest the reason with which it is named.  Files that change or vanish while they are
used are for the tests that use them: take any of these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.media.files import DataFile
from utils.data.media.pixels import MediaInfo
from utils.data.values import AS_IT_IS, Bucket, Reading


@dataclass(frozen=True)
class Used:
    """A file that is used, and how it must look."""

    info: MediaInfo
    pixels: np.ndarray
    """uint8 [frames, height, width, 3], for the bucket of that size."""
    tolerance: int = 0
    """Largest difference of a value, where rounding is free or the format is lossy."""
    fps: float | None = None
    """What a clip is resampled to."""

    @property
    def bucket(self) -> Bucket:
        frames, height, width, _ = self.pixels.shape
        return Bucket(width, height, frames)


@dataclass(frozen=True)
class Named:
    """A file that cannot be used; ``reason`` is a part of what is said of it."""

    reason: str


@dataclass(frozen=True)
class Awkward:
    """One input: a picture or clip, and its caption in a ``.txt`` file beside it."""

    name: str
    """What is awkward about it."""
    path: Path
    outcome: Used | Named
    caption: str | None
    """What its caption must be; None: it has none, or none that can be read."""
    caption_problem: str = ""
    """Part of what is said of a caption that cannot be used."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the dataset file that it needs.  An input with any lies in a folder of its own, all others in one together."""
    reading: Reading = AS_IT_IS
    """The same, as far as it changes pixels."""

    @property
    def file(self) -> DataFile:
        return DataFile(self.path)

    @property
    def alone(self) -> bool:
        return bool(self.settings)


class Corpus:
    """Collects the inputs while they are written below ``folder``."""

    def __init__(self, images: Mapping[str, Path], clips: Mapping[str, Path], folder: Path):
        self.images, self.clips, self.folder = images, clips, folder
        self.inputs: list[Awkward] = []

    def add(
        self,
        name: str,
        file: str,
        content: bytes | Callable[[Path], object],
        outcome: Callable[[Path], Used] | str,
        *,
        caption: bytes | None = b"a picture",
        reads: str | None = "a picture",
        caption_problem: str = "",
        settings: Mapping[str, Any] | None = None,
        reading: Reading = AS_IT_IS,
    ) -> None:
        """``content``: the file's bytes, or what writes it; ``outcome``: what makes the reference of the file, or the reason.

        ``caption``: the bytes beside it; ``reads``: the text that must come of them.
        """
        path = self.folder / (name.replace(" ", "_") if settings else "together") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)
        expected = Named(outcome) if isinstance(outcome, str) else outcome(path)
        self.inputs.append(Awkward(name, path, expected, reads, caption_problem, settings or {}, reading))


def picture(pixels: np.ndarray, tolerance: int = 0) -> Callable[[Path], Used]:
    """A picture that looks like this [height, width, 3]."""
    height, width = pixels.shape[:2]
    return lambda path: Used(MediaInfo(width, height, 1, None), pixels[None], tolerance)


def awkward_inputs(assets, folder: Path) -> list[Awkward]:
    """Write all of them; ``assets`` is the fixture.  Takes a few seconds."""
    from tests.utils.data.corpus_clips import add_clips
    from tests.utils.data.corpus_names import add_captions, add_names
    from tests.utils.data.corpus_pictures import add_colours, add_files, add_pictures

    corpus = Corpus(assets.images, assets.clips, folder)
    for add in (add_pictures, add_colours, add_files, add_clips, add_names, add_captions):
        add(corpus)
    names = [one.name for one in corpus.inputs]
    assert len(set(names)) == len(names)
    return corpus.inputs
