"""What goes into an encoder, as a key: an input with another key is encoded anew, one with the same key never."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from utils.data.captions.variants import texts_of, with_caption
from utils.data.encoders import ConditionEncoder
from utils.data.masks import has_mask
from utils.data.media.pixels import PIXELS_VERSION, covering
from utils.data.values import AS_IT_IS, CENTRE, Bucket, Control, Sample


class Input(NamedTuple):
    """What an encoder is to be given: a sample with one of its captions."""

    sample: Sample
    caption: str

    def captioned(self) -> Sample:
        return with_caption(self.sample, self.caption)


def input_key(sample: Sample, encoder: ConditionEncoder) -> str:
    """Hash of what the encoder sees of a sample with its ``caption``."""
    return _key(sample, sample.caption, encoder)


def keys_of(sample: Sample, encoder: ConditionEncoder) -> Iterator[str]:
    """The keys of all that the encoder may be given of a sample: one for each caption, or none for a mask that it has not."""
    if encoder.reads == "mask" and not has_mask(sample):
        return
    for text in texts_of(sample) if "caption" in encoder.reads else (sample.caption,):
        yield _key(sample, text, encoder)


def inputs_of(samples: Sequence[Sample], encoder: ConditionEncoder) -> dict[str, Input]:
    """The different inputs of an encoder by their keys, each with the first sample that has it."""
    inputs: dict[str, Input] = {}
    if encoder.reads == "caption":
        # Many samples share few texts, and there may be hundreds of thousands of them.
        texts: dict[str, Sample] = {}
        for sample in samples:
            for text in texts_of(sample):
                texts.setdefault(text, sample)
        return {_key(sample, text, encoder): Input(sample, text) for text, sample in texts.items()}
    for sample in samples:
        if encoder.reads == "mask" and not has_mask(sample):
            continue
        for text in texts_of(sample) if "caption" in encoder.reads else (sample.caption,):
            inputs.setdefault(_key(sample, text, encoder), Input(sample, text))
    return inputs


def num_pixels(sample: Sample, encoder: ConditionEncoder) -> int:
    """What of a sample is decoded for the encoder."""
    frames = min(sample.bucket.frames, encoder.max_frames or sample.bucket.frames)
    pictures = frames * ("pixels" in encoder.reads or encoder.reads == "mask")
    pictures += len(sample.controls) * ("controls" in encoder.reads) + len(known_frames(sample, encoder))
    return sample.bucket.width * sample.bucket.height * pictures


def known_frames(sample: Sample, encoder: ConditionEncoder) -> list[tuple[str, Control]]:
    """The given frames of a sample that the encoder looks at."""
    return [known for known in sample.known_frames if known[0] in encoder.known_frames] if sample.known_frames else []


def _key(sample: Sample, caption: str, encoder: ConditionEncoder) -> str:
    # What a sample does not have, or has as most do, adds nothing: so most keys stay when there is something new to have.
    parts: list[object] = []
    reads = encoder.reads
    if "caption" in reads:
        parts += ["caption", caption]
    if "pixels" in reads:
        parts += ["pixels", PIXELS_VERSION, sample.content, _size(sample.bucket), *_time(sample), *_cut(sample), *_behind(sample)]
        for name, control in known_frames(sample, encoder):
            parts += [name, control.content, *_place(sample)]
    if "controls" in reads:
        size = (sample.bucket.width, sample.bucket.height)
        parts += ["controls", PIXELS_VERSION, *size, *(control.content for control in sample.controls)]
        parts += [*_place(sample), *_behind(sample)]
    if reads == "mask":
        content = sample.mask.content if sample.mask else f"alpha of {sample.content}"
        parts += ["mask", PIXELS_VERSION, content, _size(sample.bucket), *_time(sample), *_place(sample)]
        parts += [] if sample.reading.animated == AS_IT_IS.animated else [sample.reading.animated]
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _size(bucket: Bucket) -> str:
    return f"{bucket.width}x{bucket.height}x{bucket.frames}"


def _time(sample: Sample) -> tuple[object, ...]:
    """A picture has neither a rate nor a part to choose.  Which frame of a clip is the first depends on the bucket's length."""
    return (sample.fps, sample.first_frame) if sample.fps is not None else ()


def _place(sample: Sample) -> tuple[object, ...]:
    """The framing, for what has another size than the sample itself: a box is the same part of it."""
    framing = sample.framing
    if framing is CENTRE or framing == CENTRE:
        return ()
    return ("framed", framing.x, framing.y, *((framing.box, "of", sample.original_size) if framing.box else ()))


def _cut(sample: Sample) -> tuple[object, ...]:
    """The framing of the sample's own pixels, as far as it makes a difference: where nothing is cut there is no place to choose."""
    framing, whole = sample.framing, sample.original_size
    if framing is CENTRE:  # as most are
        return ()
    if whole is None:
        return _place(sample)
    box = None if framing.box == (0, 0, *whole) else framing.box
    size = (box[2] - box[0], box[3] - box[1]) if box else whole
    cover = covering(size, (sample.bucket.width, sample.bucket.height))
    x = framing.x if cover.width > sample.bucket.width else CENTRE.x
    y = framing.y if cover.height > sample.bucket.height else CENTRE.y
    return ("framed", box, x, y) if (box, x, y) != (CENTRE.box, CENTRE.x, CENTRE.y) else ()


def _behind(sample: Sample) -> tuple[object, ...]:
    """The colour behind transparent parts.  Whether an animated picture is a clip shows in the frame rate."""
    background = sample.reading.background
    return () if background == AS_IT_IS.background else ("on", background)
