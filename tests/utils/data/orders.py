"""Samples without files, and orders of them, for the tests of what is shown when."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

from hypothesis import strategies as st

from utils.data.batches.order import EpochOrder, MicroBatchPlan
from utils.data.batches.sizes import BatchSizes
from utils.data.media.files import DataFile
from utils.data.values import Bucket, Control, Sample, SizeRules

BUCKETS = [Bucket(64, 64, 1), Bucket(64, 64, 9), Bucket(96, 48, 9)]
RULES = SizeRules(multiple=16, frame_step=4, fps=16.0)
"""16, 48 and 54 tokens."""


def sample(number: int, bucket: Bucket, repeats: Fraction | int = 1, num_controls: int = 0, loss_weight: float = 1.0) -> Sample:
    path = Path(f"{number}.mp4")
    controls = tuple(Control(DataFile(Path(f"{number}-{place}.png")), f"{number}-{place}") for place in range(num_controls))
    return Sample(
        f"data/{path.name}@{bucket}",
        DataFile(path),
        f"{number:040}",
        "a caption",
        bucket,
        fps=16.0,
        repeats=Fraction(repeats),
        controls=controls,
        loss_weight=loss_weight,
    )


REPEATS = st.one_of(
    st.integers(1, 3).map(Fraction),
    st.fractions(min_value=Fraction(1, 6), max_value=3, max_denominator=7),
    st.fractions(min_value=Fraction(1, 50), max_value=2, max_denominator=997),
)
SIZES = st.one_of(
    st.integers(1, 5).map(BatchSizes),
    st.builds(BatchSizes, clips=st.integers(1, 3), pictures=st.integers(1, 6)),
    st.builds(BatchSizes, max_tokens=st.integers(1, 300), rules=st.just(RULES)),
)


@st.composite
def orders(draw: st.DrawFn, repeats: st.SearchStrategy[Fraction] = REPEATS) -> EpochOrder:
    """Several samples often have the same number of repeats, as those of a directory do."""
    choices = draw(st.lists(repeats, min_size=1, max_size=3))
    kind = st.tuples(st.sampled_from(BUCKETS), st.sampled_from(choices), st.integers(0, 2))
    kinds = draw(st.lists(kind, min_size=1, max_size=25))
    samples = [sample(number, *kind) for number, kind in enumerate(kinds)]
    return EpochOrder(samples, draw(SIZES), draw(st.integers(0, 3)))


def shown_in(plans: list[MicroBatchPlan]) -> Counter[str]:
    """How often each sample is in the micro-batches."""
    return Counter(key for plan in plans for key, _ in plan.members)
