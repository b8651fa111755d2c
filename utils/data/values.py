"""The small values that carry data from the folders to the engine."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

from utils.data.media.files import DataFile


@dataclass(frozen=True)
class SizeRules:
    """What sizes a family can train on."""

    multiple: int
    """Width and height in pixels are multiples of this."""
    frame_step: int | None
    """Clips have ``frame_step * k + 1`` frames; None: pictures only."""
    fps: float | None
    """Frames per second that the model was trained at; None: pictures only."""
    token_side: int = 16
    """Pixels along each side of what becomes one token of the model (one place of the latents, where it has no tokens)."""
    known_frames: tuple[Literal["first", "last"], ...] = ()
    """The frames of a clip that the model is shown, which may be given as pictures of their own."""

    def tokens(self, bucket: "Bucket") -> int:
        """Tokens that a sample of the bucket has in the model, without its text and control pictures."""
        frames = 1 if self.frame_step is None else (bucket.frames - 1) // self.frame_step + 1
        return frames * (bucket.width // self.token_side) * (bucket.height // self.token_side)


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
class Framing:
    """What of a picture is used: a box of it, scaled to just cover the bucket, and of that the part at a place."""

    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) in pixels of the picture as it is displayed; None: all of it."""
    x: float = 0.5
    """Where the part that stays lies in what is cut in width: 0 at the left, 0.5 in the middle, 1 at the right."""
    y: float = 0.5
    """The same in height, 0 at the top."""


CENTRE = Framing()


@dataclass(frozen=True)
class Reading:
    """How files are read, as far as it changes pixels."""

    background: tuple[int, int, int] = (255, 255, 255)
    """RGB of what lies behind transparent parts."""
    animated: Literal["clip", "first_frame"] = "clip"
    """What an animated picture (GIF, WebP, PNG, AVIF) is taken for."""


AS_IT_IS = Reading()


@dataclass(frozen=True)
class Control:
    """A picture that belongs to a sample: what an editing model is given to edit, a mask, a given first frame."""

    file: DataFile
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
    """Stable name within the data set: ``<directory's name>/<file>@<bucket>``, and for a later part of a clip ``+<first frame>``
    behind it.  Random draws hang on it."""
    file: DataFile
    content: str
    """Hash of the file's bytes."""
    caption: str
    bucket: Bucket
    fps: float | None = None
    """Frames per second that a clip is resampled to; None: a picture."""
    first_frame: int = 0
    """Where the sample begins in its clip, in frames of ``fps`` after the clip's first one."""
    repeats: Fraction = Fraction(1)
    """How often an epoch shows it, on average over the epochs."""
    controls: tuple[Control, ...] = ()
    """In the order of the directory's ``control_path``; scaled and cropped as the sample is."""
    original_size: tuple[int, int] | None = None
    """(width, height) of the file as it is displayed."""
    captions: tuple[Caption, ...] = ()
    """The texts of which training shows one at a time; none: always ``caption``, which is also the one of evaluation."""
    caption_dropout: float = 0.0
    """Probability of an empty caption in place of any other."""
    framing: Framing = CENTRE
    reading: Reading = AS_IT_IS
    mask: Control | None = None
    """A picture or clip that is white where the loss counts, scaled and cropped as the sample is; None: it counts everywhere."""
    alpha_mask: bool = False
    """The mask is the file's own alpha channel."""
    known_frames: tuple[tuple[Literal["first", "last"], Control], ...] = ()
    """Pictures that are shown to the model in place of the clip's own first or last frame."""
    loss_weight: float = 1.0
    """Its loss is multiplied by this."""


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
