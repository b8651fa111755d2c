"""How often an epoch shows what, held against the sentences of the settings."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from utils.data.sources.repeats import as_fraction, factors

totals_and_kinds = st.lists(st.tuples(st.fractions(0, 5000, max_denominator=60), st.booleans()), min_size=1, max_size=8).filter(
    lambda parts: any(total > 0 and not reg for total, reg in parts)
)


def shown(parts: list[tuple[Fraction, bool]], temperature: float | None = None) -> list[Fraction]:
    """Samples of each directory that an epoch shows."""
    totals, is_reg = zip(*parts, strict=True)
    scales = factors(totals, is_reg, temperature)
    return [total * scale for total, scale in zip(totals, scales, strict=True)]


def test_decimals_are_what_they_say():
    assert as_fraction(0.1) == Fraction(1, 10)
    assert as_fraction(2.5) == Fraction(5, 2)
    assert as_fraction(3) == 3
    for wrong in (0, -1, 10001, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"not|Invalid"):
            as_fraction(wrong)


def test_by_hand():
    parts = [(Fraction(100), False), (Fraction(25), False)]
    assert shown(parts) == [100, 25]
    # Square roots are 10 and 5: two thirds and one third of 125.
    assert shown(parts, 2.0) == [Fraction(250, 3), Fraction(125, 3)]
    assert shown([*parts, (Fraction(1000), True), (Fraction(250), True)]) == [100, 25, 100, 25]
    assert shown([*parts, (Fraction(10), True)]) == [100, 25, 125]
    assert shown([(Fraction(0), False), (Fraction(7), False), (Fraction(0), True)], 3.0) == [0, 7, 0]


@given(parts=totals_and_kinds, temperature=st.one_of(st.none(), st.floats(1, 1e6)))
def test_the_epoch_keeps_its_length(parts: list[tuple[Fraction, bool]], temperature: float | None):
    numbers = shown(parts, temperature)
    trained = [number for number, (_, reg) in zip(numbers, parts, strict=True) if not reg]
    regularising = [number for number, (_, reg) in zip(numbers, parts, strict=True) if reg]
    epoch = sum(total for total, reg in parts if not reg)
    assert sum(trained) == epoch
    if any(total for total, reg in parts if reg):
        assert sum(regularising) == epoch
    assert all((number > 0) == (total > 0) for number, (total, _) in zip(numbers, parts, strict=True))


@given(parts=totals_and_kinds, temperature=st.floats(1, 1e6))
@example(parts=[(Fraction(1), False), (Fraction(3), False)], temperature=1.0000000000000002)
def test_a_temperature_evens_out(parts: list[tuple[Fraction, bool]], temperature: float):
    before = [(total, number) for (total, reg), number in zip(parts, shown(parts), strict=True) if not reg and total]
    after = [number for (total, reg), number in zip(parts, shown(parts, temperature), strict=True) if not reg and total]
    order = sorted(range(len(after)), key=lambda place: before[place][0])
    assert [after[place] for place in order] == sorted(after), "the order of sizes stays"
    assert max(after) / min(after) <= max(before)[1] / min(before)[1] * Fraction(1000001, 1000000)


@given(parts=totals_and_kinds)
def test_a_temperature_of_one_changes_nothing_and_a_large_one_makes_all_alike(parts: list[tuple[Fraction, bool]]):
    assert shown(parts, 1.0) == shown(parts, None)
    alike = [number for (total, reg), number in zip(parts, shown(parts, 1e9), strict=True) if not reg and total]
    assert max(alike) - min(alike) <= max(alike) / 1000
