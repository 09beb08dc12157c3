"""Nested dropout: of ordered parts only the first few are kept, so that every prefix of them means something
(https://arxiv.org/abs/1402.0915).
"""

from typing import Literal

import torch
from torch import Tensor

from lexel.errors import UsageError

Keep = Literal["uniform", "powers", "rounded"]
KEEP: tuple[Keep, ...] = ("uniform", "powers", "rounded")


def powers_of_two(most: int | None, least: int = 1) -> list[int]:
    """1, 2, 4, ... from `least` on, and `most`; nothing of nothing."""
    return [count for count in range(least, (most or 0) + 1) if count == most or count & (count - 1) == 0]


class NestedDropout:
    """How many of `count` ordered parts are kept, drawn for every image.

    Args:
        count: of the parts.
        keep: "uniform", any number from `least` is as likely; "powers", any power of two and `count`; "rounded", a
            uniform number is rounded up to a power of two (at most `count`), as in FlexTok
            (https://arxiv.org/abs/2502.13967).
        full: the probability that all are kept, before any other number is drawn.
        least: the smallest number kept.

    Raises:
        UsageError: a number is out of range, or `keep` is unknown.
    """

    def __init__(self, count: int, keep: Keep = "uniform", full: float = 0.0, least: int = 1) -> None:
        if keep not in KEEP:
            raise UsageError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
        if not 1 <= least <= count or not 0 <= full <= 1:
            raise UsageError(f"least must be in [1, {count}] and full in [0, 1], got {least} and {full}")
        self.count, self.full = count, full
        counts = range(least, count + 1)
        self.lengths = list(counts)  # as likely each
        if keep == "powers":
            self.lengths = powers_of_two(count, least)
        elif keep == "rounded":
            self.lengths = [min(1 << (length - 1).bit_length(), count) for length in counts]

    def draw(self, images: int, device: torch.device) -> Tensor:
        """The number of parts kept of each image: int64 (images,)."""
        choices = torch.tensor(self.lengths, device=device)
        drawn = choices[torch.randint(len(self.lengths), (images,), device=device)]
        return drawn.where(torch.rand(images, device=device) >= self.full, torch.full_like(drawn, self.count))
