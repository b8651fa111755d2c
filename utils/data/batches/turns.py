"""How often samples appear in each epoch, where the number of repeats need not be whole.

Of ``n`` samples with ``r`` repeats, the one at place ``i`` has appeared ``floor(E r + i / n)`` times after ``E`` epochs: less than
one time more or less than ``E r``.  All of them together have appeared ``floor(n E r)`` times (Hermite's identity), as exactly as
whole numbers can be.  So with half a repeat each epoch shows half of the samples, and the next one the other half.
"""

from fractions import Fraction
from math import gcd

import torch

from utils.draw import generator


class Turns:
    """The appearances of ``number`` samples, each ``repeats`` times an epoch on average, as whole numbers."""

    def __init__(self, number: int, repeats: Fraction, seed: int, purpose: str):
        self.number, self.repeats = number, Fraction(repeats)
        self._seed, self._purpose = seed, purpose
        self._places: list[int] | None = None

    @property
    def period(self) -> int:
        """The total is the same again after so many epochs."""
        return self.repeats.denominator // gcd(self.repeats.denominator, self.number)

    def total(self, epoch: int) -> int:
        """Appearances of all samples together in an epoch."""
        return self._until(epoch + 1) - self._until(epoch)

    def _until(self, epochs: int) -> int:
        return self.number * epochs * self.repeats.numerator // self.repeats.denominator

    def next_shown(self, epoch: int) -> int:
        """The first epoch from this one on that shows one of the samples."""
        steps = self.number * self.repeats.numerator
        return max(epoch, -(-(self._until(epoch) + 1) * self.repeats.denominator // steps) - 1)

    def times(self, epoch: int) -> list[int]:
        """Appearances of each sample in an epoch."""
        whole, below = self.repeats.numerator, self.repeats.denominator
        if below == 1:
            return [whole] * self.number
        if self._places is None:
            order = generator(self._seed, self._purpose)
            self._places = torch.randperm(self.number, generator=order).tolist()
        before, after, all_of_one = self.number * epoch * whole, self.number * (epoch + 1) * whole, self.number * below
        places = [place * below for place in self._places]
        return [(after + place) // all_of_one - (before + place) // all_of_one for place in places]
