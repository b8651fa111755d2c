"""Where the memory is too small: fewer items at once, then parts of them, then an error that names the item."""

import logging
import re
from pathlib import Path

import pytest
import torch

from tests.utils.data.encode_worker import Bytes, Pooling, samples_of
from utils.data.cache import DatasetCache
from utils.data.cache.memory import is_out_of_memory
from utils.errors import UserError

CPU = torch.device("cpu")


class Limited(Pooling):
    """Fails as torch does on a GPU, or on the CPU, for more than so many pixels at once."""

    def __init__(self, pixels: int, error: type[RuntimeError], tiles: bool = False):
        super().__init__()
        self.pixels, self.error, self.tiles, self.in_tiles = pixels, error, tiles, False

    def use_tiles(self, on: bool) -> bool:
        self.in_tiles = self.tiles and on
        return self.tiles

    def outputs(self, items):
        need = sum(item.pixels[0].numel() for item in items)
        if need > self.pixels * (4 if self.in_tiles else 1):
            raise self.error("CUDA out of memory." if self.error is torch.OutOfMemoryError else real_message())
        return super().outputs(items)


def real_message() -> str:
    """What torch says when the host has too little memory."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert not isinstance(raised.value, torch.OutOfMemoryError)
    return str(raised.value)


def test_both_kinds_of_errors_are_known():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError(real_message()))
    assert not is_out_of_memory(RuntimeError("expected 5-dimensional input"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_fewer_items_at_once(mixed: Path, tmp_path: Path, caplog, error):
    pictures = [sample for sample in samples_of(mixed, resolutions=[64, 48]) if sample.bucket.frames == 1]
    # One of 64 x 64 and two of 48 x 48 fit, not two of 64 x 64.
    limited = Limited(2 * 48 * 48, error)
    cache = DatasetCache(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        cache.build(pictures, [limited], device=CPU, batch_size=2)
    [message] = caplog.messages
    assert re.fullmatch(
        r"pooling: the memory is too small for 2 items of 64x64x1 at once \(mixed/\w+\.png@64x64x1, …\): from now on 1", message
    )
    # What failed is counted as well.
    assert limited.batches == [2, 1, 1, 2]
    DatasetCache(tmp_path / "plain").build(pictures, [Pooling()], device=CPU)
    for sample in pictures:
        expected = DatasetCache(tmp_path / "plain").read(sample, [Pooling()])
        assert all(torch.equal(value, expected[name]) for name, value in cache.read(sample, [limited]).items())


def test_tiles_for_what_does_not_fit_alone(mixed: Path, tmp_path: Path, caplog):
    samples = samples_of(mixed, resolutions=[64, 48])
    largest = 9 * 64 * 64
    limited = Limited(largest // 2, torch.OutOfMemoryError, tiles=True)
    with caplog.at_level(logging.WARNING):
        DatasetCache(tmp_path / "cache").build(samples, [limited], device=CPU, batch_size=2)
    told = [message.split("too small for ")[1].split(" of ", 1)[1] for message in caplog.messages]
    assert [line.endswith("in tiles from now on") for line in told].count(True) == 2  # the clips of both sizes, not the pictures
    assert not limited.in_tiles


def test_what_does_not_fit_at_all_is_named_and_the_rest_is_kept(mixed: Path, tmp_path: Path):
    samples = samples_of(mixed, resolutions=[64, 48])
    limited = Limited(100, torch.OutOfMemoryError)
    with pytest.raises(UserError, match=r"pooling: the memory is too small for mixed/\S+ of 64x64x9, alone. Use smaller resol"):
        DatasetCache(tmp_path / "cache").build(samples, [Bytes(), limited], device=CPU)
    assert limited.loaded == 0
    assert DatasetCache(tmp_path / "cache").build(samples, [Bytes()], device=CPU).encoders[0].found == 4


def test_other_errors_stay_what_they_are(mixed: Path, tmp_path: Path):
    class Wrong(Pooling):
        def outputs(self, items):
            raise RuntimeError("expected 5-dimensional input")

    with pytest.raises(RuntimeError, match="5-dimensional"):
        DatasetCache(tmp_path / "cache").build(samples_of(mixed), [Wrong()], device=CPU)
