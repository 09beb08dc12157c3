"""Parts of bulk work: I of N, so that jobs which know nothing of each other share it without gap or overlap."""

import re
from typing import NamedTuple, Self

from lexel.errors import UsageError


class Part(NamedTuple):
    """One of several parts of bulk work.

        Part.parse("2/8").blocks(50_000, 64)  # range(6272, 12544): whole blocks of 64, the second eighth of them

    Attributes:
        number: from 1, as array jobs and people count.
        parts: how many there are in all.
    """

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The part that "I/N" names.

        Raises:
            UsageError: it is no such fraction.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"{text!r} is no part; write I/N with 1 <= I <= N, such as 3/16")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    def blocks(self, total: int, block: int) -> range:
        """This part of the numbers [0, total): neighbours, cut only at multiples of `block`; it may be empty."""
        blocks = -(-total // block)
        first, last = (blocks * edge // self.parts for edge in (self.number - 1, self.number))
        return range(min(first * block, total), min(last * block, total))
