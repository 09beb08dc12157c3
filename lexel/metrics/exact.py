"""Sums that are rounded once, at the end: the same bits in any order, over any batches, parts and processes."""

import math
from collections.abc import Iterable

from lexel.errors import UsageError

UNIT = 1074  # the smallest double is 2^-1074: all doubles are whole multiples of it
MOST_DIGITS = 700  # of a kept sum: the largest double has 632 decimal digits in that unit


class ExactSum:
    """The exact sum of doubles, as a whole number of the smallest double.

    About a microsecond a value: for one number an image, not for features. Infinities and NaN add as they do in
    floating point.
    """

    def __init__(self) -> None:
        self._units = 0
        self._unbounded = 0.0  # the sum of what is infinite or NaN

    def add(self, values: Iterable[float]) -> None:
        """Adds values."""
        for value in values:
            if math.isfinite(value):
                numerator, denominator = value.as_integer_ratio()  # the denominator is a power of two
                self._units += numerator << (UNIT + 1 - denominator.bit_length())
            else:
                self._unbounded += value

    def merge(self, other: "ExactSum") -> None:
        self._units += other._units
        self._unbounded += other._unbounded

    def __float__(self) -> float:
        """The nearest double."""
        if self._unbounded:  # NaN too
            return self._unbounded
        try:
            return self._units / (1 << UNIT)
        except OverflowError:
            return math.copysign(math.inf, self._units)

    def text(self) -> str:
        """All of it, to be kept in a file."""
        return f"{self._units:x} {self._unbounded!r}"

    @classmethod
    def of_text(cls, text: object) -> "ExactSum":
        """The number that `text` wrote.

        Raises:
            UsageError: it is damaged.
        """
        other = cls()
        try:
            units, unbounded = str(text)[: 2 * MOST_DIGITS].split(" ")
            other._units, other._unbounded = int(units, 16), float(unbounded)
        except ValueError:
            raise UsageError(f"a saved sum is damaged: {str(text)[:40]!r}") from None
        return other
