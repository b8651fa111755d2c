"""Which parts of a clip become samples: tables by hand, and what holds for all lengths."""

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.config.dataset import ClipMode
from utils.data.sources.clip_parts import first_frames, left_over


@pytest.mark.parametrize(
    ("mode", "available", "length", "number", "expected"),
    [
        ("single_beginning", 100, 33, None, [0]),
        ("single_middle", 100, 33, None, [33]),
        ("single_middle", 33, 33, None, [0]),
        # diffusion-pipe: torch.linspace(0, 67, 4).int()
        ("multiple_overlapping", 100, 33, None, [0, 22, 44, 67]),
        ("multiple_overlapping", 34, 33, None, [0, 1]),
        ("multiple_overlapping", 33, 33, None, [0]),
        ("multiple_overlapping", 99, 33, None, [0, 33, 66]),
        ("non_overlapping", 100, 33, None, [0, 33, 66]),
        ("non_overlapping", 65, 33, None, [0]),
        ("uniform", 100, 33, 3, [0, 33, 67]),
        ("uniform", 100, 33, 1, [33]),
        ("uniform", 35, 33, 9, [0, 1, 2]),
        ("uniform", 33, 33, 4, [0]),
    ],
)
def test_places(mode: ClipMode, available: int, length: int, number: int | None, expected: list[int]):
    assert first_frames(mode, available, length, number) == expected


@given(
    mode=st.sampled_from(get_args(ClipMode)),
    length=st.integers(1, 200),
    more=st.integers(0, 1000),
    number=st.integers(1, 30),
)
def test_all_parts_lie_in_the_clip(mode: ClipMode, length: int, more: int, number: int):
    available = length + more
    starts = first_frames(mode, available, length, number)
    assert starts == sorted({*starts})
    assert starts
    assert starts[0] >= 0
    assert starts[-1] + length <= available
    covered = {frame for start in starts for frame in range(start, start + length)}
    if mode == "multiple_overlapping":
        assert covered == {*range(available)}
        assert len(starts) == -(-available // length), "as few parts as can cover it"
    if mode == "non_overlapping":
        assert len(covered) == len(starts) * length
        assert len(covered) + left_over(mode, available, length) == available
    if mode == "uniform":
        assert len(starts) == min(number, more + 1)
        gaps = {later - earlier for earlier, later in pairwise(starts)}
        assert not gaps or max(gaps) - min(gaps) <= 1
    if mode != "non_overlapping":
        assert left_over(mode, available, length) == 0
