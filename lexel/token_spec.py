"""The layout of an image's tokens: one grid, several grids from coarse to fine, or several codebooks a cell."""

import math
from typing import NamedTuple


class TokenSpec(NamedTuple):
    """The layout of one image's tokens, which a tokenizer gives and a generator is built for."""

    grids: tuple[tuple[int, ...], ...]  # ((16, 16),); ((32,),) for 1-D tokens; several for scales or levels
    codebook_size: int
    books: int | None = None  # codes a cell of residual and product quantizers; None where a cell has one code

    @property
    def cells(self) -> int:
        """Cells of all grids together, T."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def length(self) -> int:
        """Tokens of one image: cells times codebooks."""
        return self.cells * (self.books or 1)

    @property
    def bits(self) -> float:
        """Bits of one image's tokens, each written with log2(codebook_size)."""
        return self.length * math.log2(self.codebook_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's indices: (*grid) or (books, *grid); (T,) or (books, T) for several grids."""
        grid = self.grids[0] if len(self.grids) == 1 else (self.cells,)
        return grid if self.books is None else (self.books, *grid)
