"""How often an epoch shows what: exact fractions, so that nothing is lost or gained over many epochs.

An epoch can only show a sample a whole number of times.  A sample with 5/2 repeats is shown five times in two epochs; which of
them has the third showing is the order's to say (``batches``).
"""

from collections.abc import Sequence
from fractions import Fraction

_SHARES = 10**12
"""Shares by temperature are multiples of the largest one over this: a power has no exact value, and may differ in its last bit."""


def factors(totals: Sequence[Fraction], is_reg: Sequence[bool], temperature: float | None) -> list[Fraction]:
    """What the repeats of each directory's samples are multiplied by; ``totals``: the sums of their repeats.

    ``temperature``: the directories that are no regularisation sets divide the same epoch by ``total ** (1 / temperature)``.
    The regularisation sets are together shown as often as all others.  A directory without samples has the factor 1.
    """
    trained = [total for total, reg in zip(totals, is_reg, strict=True) if not reg]
    epoch, regularising = sum(trained, Fraction(0)), sum(totals, Fraction(0)) - sum(trained, Fraction(0))
    shares = _shares(trained, temperature)
    evened = iter([epoch * share / total if total else Fraction(1) for share, total in zip(shares, trained, strict=True)])
    for_reg = epoch / regularising if regularising else Fraction(1)
    return [for_reg if reg else next(evened) for reg in is_reg]


def _shares(totals: Sequence[Fraction], temperature: float | None) -> list[Fraction]:
    """The part of the epoch that each directory has; they add up to exactly 1."""
    weights = list(totals)
    if temperature is not None and temperature != 1:
        largest = max(totals, default=Fraction(0))
        powers = [float(total / largest) ** (1 / temperature) if total else 0.0 for total in totals]
        weights = [Fraction(max(1, round(power * _SHARES)) if power else 0) for power in powers]
    whole = sum(weights, Fraction(0))
    return [weight / whole for weight in weights] if whole else [Fraction(0)] * len(weights)


def as_fraction(number: float | int | str) -> Fraction:
    """The fraction that a decimal number means as it is written: 0.1 is a tenth.  ValueError for what is no number above 0."""
    repeats = Fraction(str(number))
    if not 0 < repeats <= 10000:
        raise ValueError(f"{number} is not above 0 and at most 10000")
    return repeats
