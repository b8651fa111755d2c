"""The small values that carry data from the folders to the engine."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class SizeRules:
    """What sizes a family can train on."""

    multiple: int
    """Width and height in pixels are multiples of this."""
    frame_step: int | None
    """Clips have ``frame_step * k + 1`` frames; None: pictures only."""
    fps: float | None
    """Frames per second that the model was trained at; None: pictures only."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels and frames; only samples of one bucket share a micro-batch."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Control:
    """A picture that conditions a sample: what an editing model is given to edit."""

    path: Path
    content: str
    """Hash of the file's bytes."""


@dataclass(frozen=True)
class Sample:
    """One picture or clip with its caption, as it will be seen by the model."""

    key: str
    """Stable name within the data set: ``<directory's name>/<file>@<bucket>``.  Random draws hang on it."""
    path: Path
    content: str
    """Hash of the file's bytes."""
    caption: str
    bucket: Bucket
    clip_mode: str
    fps: float | None
    num_repeats: int
    controls: tuple[Control, ...] = ()
    """In the order of the directory's ``control_path``; scaled and cropped to the sample's bucket."""
    original_size: tuple[int, int] | None = None
    """(width, height) of the file as it is displayed."""


@dataclass(frozen=True)
class Batch:
    """Cached tensors of a micro-batch, not yet stacked: ``fields["latents"][i]`` belongs to ``keys[i]``."""

    keys: list[str]
    """``<sample key>#<occurrence in the epoch>``: the place that random draws are made for."""
    fields: dict[str, list[Tensor]]


@dataclass(frozen=True)
class MicroBatch:
    """What ``prepare_inputs`` makes: named tensors for the first layer, named tensors for the loss."""

    inputs: dict[str, Tensor]
    target: dict[str, Tensor]
