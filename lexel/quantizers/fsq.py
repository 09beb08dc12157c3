"""Finite scalar quantization: every channel is rounded to a few levels (https://arxiv.org/abs/2309.15505)."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.quantizers.base import Quantized, Quantizer, as_grid, as_vectors, full_precision, straight_through
from lexel.quantizers.lattice import Lattice, LatticeQuantizer

MOST_FACTORED = 2**32  # codes whose factors are looked for
MOST_LEVELS = 2**22  # a dimension; float32 tells hardly more values apart


class FSQ(LatticeQuantizer):
    """Squashes each dimension into a range of L levels by tanh and rounds. No table, no loss terms.

    Codes lie in [-1, 1]. The gradient passes straight through the rounding, not around the tanh. Dimension 0
    holds the lowest digits of the index, as in the published code. Where the codes have more channels than the
    lattice has dimensions, channels repeat it (see `lattice`). A dimension of two levels is split at 0 (the published
    shift would put every latent above -3.8 into one of them).

        FSQ(codebook_size=64000, codebook_dim=6, levels=[8, 8, 8, 5, 5, 5])

    Args:
        codebook_size: number of codes, K, the product of the levels.
        codebook_dim: length of a code, D, at least the number of levels.
        levels: values in each dimension; None chooses at most D of them as near to 5 to 8 as K's factors allow
            ([8, 8, 8, 8, 4] for 16,384, [8, 5, 5, 5] for 1,000).
    """

    def __init__(self, codebook_size: int, codebook_dim: int, levels: Sequence[int] | None = None) -> None:
        super().__init__(codebook_size, codebook_dim)
        if levels is None and codebook_size > MOST_FACTORED:
            raise UsageError(f"FSQ with {codebook_size} codes needs levels, a list of integers with that product")
        chosen = choose_levels(codebook_size, codebook_dim) if levels is None else tuple(levels)
        if any(not isinstance(level, int) or isinstance(level, bool) for level in chosen):
            raise UsageError(f"levels must be integers, got {list(chosen)}")
        if math.prod(chosen) != codebook_size or min(chosen, default=0) < 2:
            known = codebook_size <= MOST_FACTORED
            hint = f"; try {list(choose_levels(codebook_size, codebook_dim))}" if known else ""
            needed = f"levels must be at least 2 each and multiply to codebook_size {codebook_size}"
            raise UsageError(f"{needed}, got {list(chosen)}{hint}")
        if max(chosen) > MOST_LEVELS:
            raise UsageError(f"a dimension has at most {MOST_LEVELS} levels, got {list(chosen)}; give more channels")
        if len(chosen) > codebook_dim:
            raise UsageError(f"{len(chosen)} levels need at least as many channels, got codebook_dim {codebook_dim}")
        self.lattice = Lattice(chosen, codebook_dim, low_first=True)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        bounded = self._bound(as_vectors(z))
        indices = self._index(bounded.detach().round())
        values = straight_through(bounded, self.lattice.digits(indices) - self.lattice.levels // 2)
        z_q = self.lattice.repeat_channels(values / (self.lattice.levels // 2))
        return Quantized(as_grid(z_q, z), indices.view(z.shape[0], *z.shape[2:]), {})

    def bake(self) -> Quantizer:
        raise UsageError(
            "FSQ has no table to search: it squashes latents by tanh before it rounds; "
            "keep it as it is, it costs nothing"
        )

    def choose(self, vectors: Tensor) -> Tensor:
        return self._index(self._bound(vectors).round())

    def values(self, digits: Tensor) -> Tensor:
        half = self.lattice.levels // 2
        return self.lattice.one * (digits - half) / half

    def _bound(self, vectors: Tensor) -> Tensor:
        """Latents (N, D) squashed so that rounding gives -(L // 2) .. (L - 1) // 2 in each dimension: (N, d)."""
        levels = self.lattice.levels.to(vectors.dtype)
        half = (levels - 1) * (1 + 1e-3) / 2  # a little room, so that the outermost levels can be reached
        offset = torch.where(self.lattice.levels % 2 == 0, 0.5, 0.0).to(vectors.dtype)
        # The shift takes a latent of 0 to the value 0. With two levels, -1 and 0, that is the end of the range: every
        # latent above -3.8 would round to it. There 0 stays between the two.
        shift = torch.where(self.lattice.levels > 2, (offset / half).atanh(), 0.0)
        return (self.lattice.mean_channels(vectors) + shift).tanh() * half - offset

    def _index(self, rounded: Tensor) -> Tensor:
        digits = rounded + self.lattice.levels // 2
        # Beyond 500 levels the room at the ends is wider than a level.
        return self.lattice.index(torch.minimum(digits.clamp_min(0), self.lattice.levels - 1))


@functools.cache
def choose_levels(codebook_size: int, most: int) -> tuple[int, ...]:
    """At most `most` factors of codebook_size, each as near to 5..8 as can be; largest first."""

    def cost(levels: tuple[int, ...]) -> float:
        return sum((math.log2(level) - math.log2(6.5)) ** 2 for level in levels)

    best: tuple[int, ...] = (codebook_size,)
    if most > 1:
        for level in range(2, math.isqrt(codebook_size) + 1):
            if codebook_size % level == 0:
                levels = (level, *choose_levels(codebook_size // level, most - 1))
                best = min(best, tuple(sorted(levels, reverse=True)), key=cost)
    return best
