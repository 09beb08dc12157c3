"""Text fidelity: the share of the originals' characters that OCR still reads in reconstructions."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lexel.metrics.intervals import Interval, jackknife
from lexel.metrics.states import Sums

OVERLAP = 0.3  # of the smaller of two boxes: lines that share less are not the same


class TextLine(Protocol):
    """A line of text and where it stands."""

    @property
    def text(self) -> str:
        """The characters that are read."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, in pixels."""


class Survival(NamedTuple):
    """The text of a picture that is read again."""

    survived: int  # characters that are still read
    characters: int  # that are read in the original, without spaces


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def survival(originals: Sequence[TextLine], reconstructed: Sequence[TextLine]) -> Survival:
    """Characters of the original's lines that are read again at their place.

    A line keeps its length less the edit distance to the best line that overlaps it, at least 0; every line of the
    reconstruction stands for one of the original at most, the best pairs first. Spaces do not count.
    """
    ours, theirs = (["".join(line.text.split()) for line in lines] for lines in (originals, reconstructed))
    pairs = []
    for i, one in enumerate(originals):
        for j, other in enumerate(reconstructed):
            if _overlap(one.box, other.box) >= OVERLAP:
                kept = len(ours[i]) - edit_distance(ours[i], theirs[j])
                if kept > 0:
                    pairs.append((kept, -i, -j))
    survived, taken_i, taken_j = 0, set(), set()
    for kept, i, j in sorted(pairs, reverse=True):
        if i not in taken_i and j not in taken_j:
            taken_i.add(i)
            taken_j.add(j)
            survived += kept
    return Survival(survived, sum(map(len, ours)))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The area that two boxes share, over that of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / smaller if width > 0 and height > 0 and smaller > 0 else 0.0


class TextState(Sums):
    """Characters that survived and characters there were, in groups for the interval.

    Args:
        groups: of pictures, each left out once.
    """

    what = "text"
    parts = ("counts",)

    def __init__(self, groups: int) -> None:
        self.counts = torch.zeros(groups, 3, dtype=torch.int64)  # survived, characters, pictures with text

    def add(self, found: Sequence[Survival], group: Tensor) -> None:
        """Adds pictures, and the group of each, int64 (B,)."""
        for each, number in zip(found, group.tolist(), strict=True):
            self.counts[number] += torch.tensor([each.survived, each.characters, int(each.characters > 0)])

    @property
    def pictures(self) -> int:
        """Pictures with text."""
        return int(self.counts[:, 2].sum())

    @property
    def share(self) -> float:
        """Characters that survived, of all; NaN where there are none."""
        return _share(self.counts.sum(0))

    def interval(self) -> Interval | None:
        """The jackknife's over groups; None where fewer than two groups have text."""
        total, filled = self.counts.sum(0), self.counts[:, 1] > 0
        if int(filled.sum()) < 2:
            return None
        return jackknife(self.share, [_share(total - counts) for counts in self.counts[filled]])


def _share(counts: Tensor) -> float:
    survived, characters, _ = counts.tolist()
    return survived / characters if characters else float("nan")
