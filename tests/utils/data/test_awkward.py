"""Every awkward input of the corpus is used rightly, or named with its reason."""

import warnings

import numpy as np
import pytest
import torch

from tests.utils.data.corpus import Awkward, Named, Used, awkward_inputs
from utils.data.files import DataFile
from utils.data.media import MediaError, load_pixels, probe
from utils.data.values import Bucket


@pytest.fixture(scope="module")
def corpus(assets, tmp_path_factory) -> list[Awkward]:
    return awkward_inputs(assets, tmp_path_factory.mktemp("awkward"))


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[C, F, H, W] in [-1, 1] -> uint8 [F, H, W, C]."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def complaint(one: Awkward, file: DataFile) -> str | None:
    """What is wrong with how the input was taken; None if nothing is."""
    expected = one.outcome
    bucket, fps = (expected.bucket, expected.fps) if isinstance(expected, Used) else (Bucket(32, 32, 1), 16.0)
    found = []
    for attempt in (lambda: probe(file, one.reading), lambda: load_pixels(file, bucket, fps, reading=one.reading)):
        try:
            found.append(attempt())
        except MediaError as error:
            found.append(error)
    if isinstance(expected, Named):
        right = all(isinstance(each, MediaError) and each.reason.startswith(expected.reason) for each in found)
        return None if right else f"{found}, and it should be named: {expected.reason}"
    info, pixels = found
    if info != expected.info or isinstance(pixels, MediaError):
        return f"{info}, and it is {expected.info}; {pixels if isinstance(pixels, MediaError) else 'it loads'}"
    worst = np.abs(to_bytes(pixels).astype(int) - expected.pixels).max()
    return None if worst <= expected.tolerance else f"a value is off by {worst}"


def test_awkward_inputs_are_used_or_named(corpus: list[Awkward]):
    assert len(corpus) >= 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrong = [f"{one.name}: {problem}" for one in corpus if (problem := complaint(one, one.file))]
    assert not wrong, "\n".join(wrong)
