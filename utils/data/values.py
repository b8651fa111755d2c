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


@dataclass(frozen=True)
class ControlRules:
    """How many control pictures each sample must and may have."""

    least: int
    most: int | None
    """None: any number."""
    instead: str = ""
    """Which setting trains a model that takes another number, for the message."""

    def allows(self, number: int) -> bool:
        return self.least <= number and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        if self.most == 0:
            return "no control pictures"
        numbers = {(0, None): "any number of", (1, None): "one or more", (1, 1): "one"}
        several = f"{self.least} to {self.most}" if self.most else f"{self.least} or more"
        return f"{numbers.get((self.least, self.most), several)} control picture{'s' * ((self.least, self.most) != (1, 1))}"


ANY_CONTROLS = ControlRules(0, None)
NO_CONTROLS = ControlRules(0, 0)


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
class Caption:
    """One of the texts that an item is shown with."""

    text: str
    weight: float = 1.0
    """How often it is shown, in proportion to the others."""


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
    captions: tuple[Caption, ...] = ()
    """The texts of which training shows one at a time; none: always ``caption``, which is also the one of evaluation."""
    caption_dropout: float = 0.0
    """Probability of an empty caption in place of any other."""


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
