"""Every awkward input of the corpus is used rightly, or named with its reason."""

import logging
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.utils.data.corpus import Awkward, Named, Used, awkward_inputs
from utils.data.media import pictures
from utils.data.media.files import DataFile
from utils.data.media.pixels import MediaError, load_pixels, probe
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


def test_in_a_tar_file_they_are_the_same(corpus: list[Awkward], tmp_path: Path):
    """Read from inside it, as from the disk; links and pipes are no files there."""
    tar = tmp_path / "set.tar"
    files = [one for one in corpus if one.path.is_file() and not one.path.is_symlink()]
    with tarfile.open(tar, "w") as archive:
        for index, one in enumerate(files):
            archive.add(one.path, f"{index}/{one.path.name}")
    with tarfile.open(tar) as archive:
        members = [DataFile(tar, info.name, info.offset_data, info.size) for info in archive]
    wrong = [f"{one.name}: {bad}" for one, file in zip(files, members, strict=True) if (bad := complaint(one, file))]
    assert len(files) > 100
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("profile: cut", "its colour profile is not used (cannot build transform); its colours are taken for sRGB"),
        ("broken EXIF", "its EXIF data is broken (Corrupt EXIF data. "),
        ("wrong count in the header", "its head says that it lasts 400.0 s, and its frames end after 0.9 s; these are used"),
    ],
)
def test_what_is_ignored_of_a_file_is_said_once(corpus: list[Awkward], caplog, tmp_path: Path, name: str, said: str):
    [awkward] = [one for one in corpus if one.name == name]
    copy = tmp_path / f"copy{awkward.path.suffix}"
    copy.write_bytes(awkward.path.read_bytes())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            probe(DataFile(copy))
    [message] = caplog.messages
    assert message.startswith(f"{copy}: {said}")


def test_heic_without_its_package_says_what_to_install(corpus: list[Awkward], monkeypatch):
    heic = [one for one in corpus if one.name == "HEIC"]
    if not heic:
        pytest.skip("pillow-heif is not installed")
    monkeypatch.setattr(pictures, "_heic_is_read", lambda: False)
    with pytest.raises(MediaError) as raised:
        probe(heic[0].file)
    assert raised.value.reason == 'it is a HEIC picture, which needs pillow-heif: pip install "flowstage[heic]"'
