"""What belongs to an input's key: all that changes what the encoder sees, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.data.encode_worker import Bytes, Pooling
from utils.data.cache import input_key, inputs_of
from utils.data.encoders import ConditionEncoder
from utils.data.masks import MaskEncoder
from utils.data.media.files import DataFile
from utils.data.values import Bucket, Caption, Control, Framing, Reading, Sample


class Controls(Pooling):
    reads = "controls"


class Both(Pooling):
    reads = "caption and controls"


class Shown(Pooling):
    """As the VAE of an image-to-video model."""

    known_frames = ("first",)


def control(name: str) -> Control:
    return Control(DataFile(Path(name)), f"content of {name}")


ENCODERS: dict[str, ConditionEncoder] = {
    "caption": Bytes(),
    "pixels": Pooling(),
    "shown": Shown(),
    "controls": Controls(),
    "both": Both(),
    "mask": MaskEncoder(),
}
SAMPLE = Sample(
    key="d/a.mp4@64x48x5",
    file=DataFile(Path("d/a.mp4")),
    content="a",
    caption="a cat",
    bucket=Bucket(64, 48, 5),
    fps=16.0,
    original_size=(640, 272),
    controls=(control("c.png"),),
    mask=control("m.png"),
    known_frames=(("first", control("f.png")),),
)
PIXELS = {"pixels", "shown"}
EVERYTHING = {*PIXELS, "controls", "both", "mask"}

Change = Callable[[Sample], Sample]
CHANGES: dict[str, tuple[Change, set[str]]] = {
    "another caption": (lambda sample: replace(sample, caption="a dog"), {"caption", "both"}),
    "another name": (lambda sample: replace(sample, key="e/b@64x48x5", file=DataFile(Path("e/b.mp4"))), set()),
    "other repeats, weight, captions to choose from": (
        lambda sample: replace(sample, repeats=3, loss_weight=0.5, captions=(Caption("a cat"), Caption("x")), caption_dropout=0.1),
        set(),
    ),
    "other bytes": (lambda sample: replace(sample, content="b"), PIXELS),
    "another size": (lambda sample: replace(sample, bucket=Bucket(64, 64, 5)), EVERYTHING),
    "another length": (lambda sample: replace(sample, bucket=Bucket(64, 48, 9)), {*PIXELS, "mask"}),
    "another rate": (lambda sample: replace(sample, fps=24.0), {*PIXELS, "mask"}),
    "a later part": (lambda sample: replace(sample, first_frame=5), {*PIXELS, "mask"}),
    "another box": (lambda sample: replace(sample, framing=Framing((0, 0, 300, 272))), EVERYTHING),
    "the box of all": (lambda sample: replace(sample, framing=Framing((0, 0, 640, 272))), {"shown", "controls", "both", "mask"}),
    "a crop farther left": (lambda sample: replace(sample, framing=Framing(x=0.1)), EVERYTHING),
    # The clip is too wide for its bucket, and not too high.  Its mask and control picture may have another shape.
    "a crop farther up": (lambda sample: replace(sample, framing=Framing(y=0.1)), {"shown", "controls", "both", "mask"}),
    "another background": (lambda sample: replace(sample, reading=Reading((0, 0, 0))), {*PIXELS, "controls", "both"}),
    "an animated mask that is a picture": (lambda sample: replace(sample, reading=Reading(animated="first_frame")), {"mask"}),
    "another control": (lambda sample: replace(sample, controls=(control("d.png"),)), {"controls", "both"}),
    "two controls": (lambda sample: replace(sample, controls=(control("c.png"), control("d.png"))), {"controls", "both"}),
    "another mask": (lambda sample: replace(sample, mask=control("n.png")), {"mask"}),
    "the alpha channel": (lambda sample: replace(sample, mask=None, alpha_mask=True), {"mask"}),
    "another first frame": (lambda sample: replace(sample, known_frames=(("first", control("g.png")),)), {"shown"}),
    "no first frame": (lambda sample: replace(sample, known_frames=()), {"shown"}),
    "a last frame too": (
        lambda sample: replace(sample, known_frames=(*sample.known_frames, ("last", control("l.png")))),
        set(),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_in_the_keys_of_those_who_see_it(name):
    change, seen_by = CHANGES[name]
    changed = change(SAMPLE)
    different = {which for which, encoder in ENCODERS.items() if input_key(changed, encoder) != input_key(SAMPLE, encoder)}
    assert different == seen_by


def test_no_two_changes_have_the_same_key():
    samples = [SAMPLE, *(change(SAMPLE) for change, _ in CHANGES.values())]
    for encoder in ENCODERS.values():
        keys = {input_key(sample, encoder) for sample in samples}
        seen = [name for name, (_, seen_by) in CHANGES.items() if any(encoder is ENCODERS[which] for which in seen_by)]
        assert len(keys) == 1 + len(seen)


def test_a_picture_has_no_time():
    picture = replace(SAMPLE, fps=None, bucket=Bucket(64, 48, 1))
    assert input_key(replace(picture, first_frame=3), Pooling()) == input_key(picture, Pooling())


def test_inputs_are_what_training_may_show_each_once():
    captions = (Caption("a cat"), Caption("one cat"))
    samples = [
        replace(SAMPLE, captions=captions, caption_dropout=0.1),
        replace(SAMPLE, key="again", captions=captions[:1]),
        replace(SAMPLE, key="unmasked", content="b", mask=None),
    ]
    counts = {name: len(inputs_of(samples, encoder)) for name, encoder in ENCODERS.items()}
    assert counts == {"caption": 3, "pixels": 2, "shown": 2, "controls": 1, "both": 3, "mask": 1}
    for name, encoder in ENCODERS.items():
        for key, entry in inputs_of(samples, encoder).items():
            assert input_key(entry.captioned(), encoder) == key, name
