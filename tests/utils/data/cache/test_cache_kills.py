"""Builds that are killed anywhere and continued, and several at once, leave what one straight build leaves."""

import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

from tests.utils.data.encode_worker import Bytes, Pooling, samples_of
from utils.data.cache import DatasetCache
from utils.data.cache.__main__ import main
from utils.data.values import Sample

CODE = str(Path(__file__).resolve().parents[4] / "utils" / "data")
KILLS = 20


def encode(samples: list[Sample], folder: Path, kill_at: int | None = None, count: "multiprocessing.Value | None" = None) -> None:
    """In a process of its own, which ends as by ``kill -9`` at its call number ``kill_at`` from within ``utils/data``.

    Calls into Python and into C count, of every thread: before and after each of them is another place to die at.
    """
    torch.set_num_threads(1)
    calls = 0

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if frame.f_code.co_filename.startswith(CODE):
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(look)
    sys.setprofile(look)
    DatasetCache(folder, shard_items=1).build(samples, [Pooling(), Bytes()], device=torch.device("cpu"))
    sys.setprofile(None)
    if count is not None:
        count.value = calls


@pytest.fixture(scope="module")
def processes():
    """Forks a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.utils.data.cache.test_cache_kills"])
    return context


def run(processes, *arguments: object) -> int:
    process = processes.Process(target=encode, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def content(folder: Path, samples: list[Sample]) -> dict[str, dict[str, Tensor]]:
    """Of those samples that are whole in the cache."""
    cache, encoders = DatasetCache(folder), [Pooling(), Bytes()]
    return {sample.key: cache.read(sample, encoders) for sample in samples}


def assert_same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for key, fields in expected.items():
        assert found[key].keys() == fields.keys()
        assert all(torch.equal(found[key][name], value) for name, value in fields.items()), key


def test_builds_killed_anywhere_and_continued(mixed: Path, tmp_path: Path, processes):
    samples = samples_of(mixed, resolutions=[48, 32])
    count = processes.Value("q", 0)
    assert run(processes, samples, tmp_path / "straight", None, count) == 0
    expected = content(tmp_path / "straight", samples)
    chance = random.Random(5)
    kills = finished = killed_since = 0
    while kills < KILLS or killed_since:
        folder = tmp_path / f"killed-{finished}"
        at = chance.randint(1, count.value) if kills < KILLS else None
        code = run(processes, samples, folder, at)
        if code == 0:
            assert_same(content(folder, samples), expected)
            assert main(["verify", str(folder)]) == 0
            finished, killed_since = finished + (killed_since > 0), 0
        else:
            assert code == -signal.SIGKILL
            kills, killed_since = kills + 1, killed_since + 1
    assert finished >= 3


def test_two_builds_at_once_in_one_folder(mixed: Path, tmp_path: Path, processes):
    """As two runs that know nothing of each other; one of them is killed on the way, and started again."""
    samples = samples_of(mixed, resolutions=[48, 32])
    count = processes.Value("q", 0)
    assert run(processes, samples, tmp_path / "straight", None, count) == 0
    both = [processes.Process(target=encode, args=(samples, tmp_path / "shared", at)) for at in (None, count.value // 2, None)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, -signal.SIGKILL, 0]
    assert_same(content(tmp_path / "shared", samples), content(tmp_path / "straight", samples))
    assert (
        DatasetCache(tmp_path / "shared").build(samples, [Pooling(), Bytes()], device=torch.device("cpu")).encoders[0].encoded == 0
    )
    assert main(["verify", str(tmp_path / "shared")]) == 0
