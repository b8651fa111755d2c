"""How fast pictures and clips become the pixels of a batch, against a plain loop, and on two processes against one."""

import json
import statistics
from pathlib import Path

from tests.distributed.harness import run_world
from tests.perf.test_perf import best_ratio


def measure(assets, processes: int, out: Path) -> list[dict]:
    """What each process of ``data_worker.py`` found."""
    out.mkdir()
    folders = (assets.clips["bikes.mp4"].parent, assets.images["coffee.png"].parent)
    run_world(["-m", "tests.perf.data_worker", *folders, out], processes, out, timeout=900)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def test_decoding_costs_hardly_more_than_a_plain_loop(assets, tmp_path: Path):
    """At least 0.9 of the samples per second of a loop over PyAV and Pillow that gives the same pixels."""
    attempts = iter(range(10))

    def ratio() -> float:
        [found] = measure(assets, 1, tmp_path / str(next(attempts)))
        ours, plain = min(found["ours"]), min(found["plain"])
        print(f"\n{found['samples'] / ours:.2f} samples/s, plain loop {found['samples'] / plain:.2f}, ratio {plain / ours:.3f}")
        return ours / plain

    assert best_ratio(ratio, 1 / 0.9) <= 1 / 0.9


def test_two_processes_decode_nearly_twice_as_fast(assets, tmp_path: Path):
    """At least 1.7 times the samples per second of one."""
    attempts = iter(range(20))

    def ratio() -> float:
        one, two = (
            sum(process["samples"] / statistics.median(process["ours"]) for process in measure(assets, processes, out))
            for processes, out in ((number, tmp_path / str(next(attempts))) for number in (1, 2))
        )
        print(f"\none process {one:.2f} samples/s, two {two:.2f}, ratio {two / one:.3f}")
        return one / two

    assert best_ratio(ratio, 1 / 1.7) <= 1 / 1.7
