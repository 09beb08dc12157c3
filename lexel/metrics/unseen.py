"""Estimates of unseen codes (Good-Turing, Chao), with pictures as the unit.

Tokens of one picture are alike, so counting single tokens would promise too much: a code that fills one sky is seen
many times in one picture and in no other. Everything here therefore counts in how many *pictures* a code occurs
(I. J. Good, Biometrika 40, 1953; W. Esty, Annals of Statistics 11, 1983; A. Chao, Biometrics 43, 1987).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.metrics.states import Sums, merge_processes

NORMAL = 1.959964  # half of the width of a 95 % interval, in standard errors
NEVER = 2**62  # the "first picture" of a code that was not seen


class Unseen(NamedTuple):
    """Estimates of the codes that the pictures so far do not show; all intervals are of 95 %."""

    pictures: int  # m
    tokens: int  # N
    codes: int  # K, of all books
    seen: int  # S, codes that occur
    in_one_picture: int  # Q1, codes that occur in a single picture
    in_two_pictures: int  # Q2
    share: float  # of the tokens of further pictures that are unseen codes: Good-Turing, tokens of the Q1 codes over N
    share_low: float
    share_high: float
    # Codes that the same number of further pictures would add (Good and Toulmin): Q1 - Q2 + Q3 - ...
    more: float
    more_low: float
    more_high: float
    # Codes that pictures like these show at all, at least (Chao): S + (m - 1) / m Q1^2 / (2 Q2), at most K
    reachable: float
    reachable_low: float
    reachable_high: float
    # A code that none of m pictures shows occurs, with 95 % confidence, in fewer pictures than this share
    rarity: float


class CodeIncidence(Sums):
    """For every code: how many tokens are it, how many pictures show it, and which of them was the first.

    Args:
        codebook_size: number of codes, K.
        books: how many codebooks of that size, Q; None where indices have no axis for them. Each code of each book
            counts by itself.
    """

    what = "counts of codes"
    parts = "tokens", "pictures", "first", "count"

    def __init__(self, codebook_size: int, books: int | None = None) -> None:
        self.codebook_size, self.books = codebook_size, books
        codes = codebook_size * (books or 1)
        self.tokens = torch.zeros(codes, dtype=torch.int64)
        self.pictures = torch.zeros(codes, dtype=torch.int64)
        self.first = torch.full((codes,), NEVER, dtype=torch.int64)
        self.count = torch.zeros((), dtype=torch.int64)  # pictures

    def add(self, indices: Tensor, numbers: Tensor) -> None:
        """Adds the indices (B, *grid), or (B, Q, *grid), of the pictures with these numbers, int64 (B,)."""
        rows = indices.cpu().flatten(1)
        if self.books is not None:
            offsets = self.codebook_size * torch.arange(self.books)
            rows = (indices.cpu().flatten(2) + offsets[:, None]).flatten(1)
        picture = torch.arange(len(rows))[:, None].expand_as(rows)
        codes = len(self.tokens)
        pairs, repeats = (picture * codes + rows).flatten().unique(return_counts=True)
        code, number = pairs % codes, numbers.cpu()[pairs // codes]
        self.tokens.index_add_(0, code, repeats)
        self.pictures.index_add_(0, code, torch.ones_like(code))
        self.first.scatter_reduce_(0, code, number, "amin")
        self.count += len(rows)

    def merge(self, other: "CodeIncidence") -> None:
        """Adds what another one has counted in other pictures."""
        self.tokens += other.tokens
        self.pictures += other.pictures
        self.first = torch.minimum(self.first, other.first)
        self.count = self.count + other.count

    def all_reduce(self) -> None:
        """Adds the pictures of every process."""
        merge_processes(self, lambda: CodeIncidence(self.codebook_size, self.books))

    @property
    def used(self) -> Tensor:
        """Whether each code occurs: bool (K,); with books, whether it occurs in any of them."""
        return (self.tokens.view(-1, self.codebook_size) > 0).any(0)

    def unseen(self) -> Unseen:
        """The estimates; shares are NaN before any picture was counted."""
        m, total, codes = int(self.count), int(self.tokens.sum()), len(self.tokens)
        seen = int((self.pictures > 0).sum())
        q1, q2 = (int((self.pictures == times).sum()) for times in (1, 2))
        if not m:
            anything = (0.0, 0.0, float(codes))
            return Unseen(0, 0, codes, 0, 0, 0, math.nan, 0.0, 1.0, *anything, *anything, rarity=1.0)
        share, low, high = self._share(m, total)
        more = min(max(self._more(), 0.0), codes - seen)
        spread = NORMAL * math.sqrt(seen + more)  # of codes counted as in a Poisson sample: what is seen and what comes
        reachable = _chao(seen, m, q1, q2)
        return Unseen(
            pictures=m,
            tokens=total,
            codes=codes,
            seen=seen,
            in_one_picture=q1,
            in_two_pictures=q2,
            share=share,
            share_low=low,
            share_high=high,
            more=more,
            more_low=max(0.0, more - spread),
            more_high=min(float(codes - seen), more + spread),
            reachable=min(reachable[0], codes),
            reachable_low=min(reachable[1], codes),
            reachable_high=min(reachable[2], codes),
            rarity=1 - 0.05 ** (1 / m),
        )

    def _share(self, m: int, total: int) -> tuple[float, float, float]:
        """Good-Turing's share of unseen codes, and Esty's interval with pictures in the place of tokens."""
        a_picture = total / m
        once, twice = self.pictures == 1, self.pictures == 2
        _, group = self.first[once].unique(return_inverse=True)
        # Of each picture that has codes of its own, their share of a picture's tokens.
        own = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=torch.float64)
        own.index_add_(0, group, self.tokens[once].double() / a_picture)
        share = float(own.sum()) / m
        squares = float(own.square().sum()) - m * share**2
        squares += 2 * float((self.tokens[twice].double() / 2 / a_picture).square().sum())
        error = NORMAL * math.sqrt(max(squares, 0.0)) / m
        # No picture of m had a code of its own: the next one has one in at most this share of cases.
        least_high = 1 - 0.05 ** (1 / m)
        return share, max(0.0, share - error), min(1.0, max(share + error, least_high))

    def _more(self) -> float:
        times = self.pictures[self.pictures > 0]
        return float((2 * (times % 2) - 1).sum())


def _chao(seen: int, m: int, q1: int, q2: int) -> tuple[float, float, float]:
    """Chao's lower bound of the number of codes that can occur, and its log-normal interval."""
    a = (m - 1) / m
    if q2:
        r = q1 / q2
        extra, variance = a * q1**2 / (2 * q2), q2 * (a / 2 * r**2 + a**2 * r**3 + a**2 / 4 * r**4)
    else:
        estimate = seen + a * q1 * (q1 - 1) / 2
        extra = a * q1 * (q1 - 1) / 2
        variance = extra + a**2 * q1 * (2 * q1 - 1) ** 2 / 4 - a**2 * q1**4 / (4 * estimate) if estimate else 0.0
    if extra <= 0:
        return float(seen), float(seen), float(seen)
    factor = math.exp(NORMAL * math.sqrt(math.log1p(max(variance, 0.0) / extra**2)))
    return seen + extra, seen + extra / factor, seen + extra * factor
