"""Several grids of latents, coarse to fine, each with a quantizer of its own (VQ-VAE-2,
https://arxiv.org/abs/1906.00446).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.quantizers.base import Quantized, Quantizer, full_precision
from lexel.quantizers.living import Recoded
from lexel.quantizers.registry import build
from lexel.quantizers.stacked import state_with_parts


class Levels(Quantizer):
    """One quantizer a level; the levels' latents lie one after another: z (B, D, T), indices (B, T).

    Built by tokenizers whose autoencoder has several levels. Loss terms are sums over the levels; indices of all
    levels count in one histogram.

    Args:
        parts: quantizers of one kind, size and dimension, coarse to fine.
        shares: cells of each level, as a ratio: (1, 4) where the finer grid has twice the rows and columns.
    """

    why_fixed = "finer latents of a tokenizer depend on coarser codes"

    def __init__(self, parts: Sequence[Quantizer], shares: Sequence[int]) -> None:
        first = parts[0]
        super().__init__(first.codebook_size, first.codebook_dim)
        if first.books is not None:
            raise UsageError("an autoencoder with several levels takes quantizers with one index a position")
        self.parts = nn.ModuleList(parts)
        self.shares = tuple(shares)
        self.take_after(first)

    def part(self, level: int) -> Quantizer:
        """The quantizer of a level."""
        return cast(Quantizer, self.parts[level])

    def __iter__(self) -> Iterator[Quantizer]:
        return (self.part(level) for level in range(len(self.parts)))

    def split(self, cells: Tensor) -> tuple[Tensor, ...]:
        """Cells (..., T) of all levels as one tensor a level."""
        total = cells.shape[-1]
        if total % sum(self.shares):
            raise UsageError(f"levels share their cells as {self.shares}, which does not divide {total}")
        return cells.split([share * total // sum(self.shares) for share in self.shares], -1)

    @property
    def codebook(self) -> Tensor:
        return torch.cat([part.codebook for part in self])

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        results = [part(cells) for part, cells in zip(self, self.split(z), strict=True)]
        losses = {name: torch.stack([result.losses[name] for result in results]).sum() for name in results[0].losses}
        z_q, indices = (torch.cat([result[place] for result in results], -1) for place in (0, 1))
        return Quantized(z_q, indices, losses)

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        return torch.cat([part.assign(cells) for part, cells in zip(self, self.split(z), strict=True)], -1)

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        parts = zip(self, self.split(indices), strict=True)
        return torch.cat([part.indices_to_codes(cells) for part, cells in parts], -1)

    def prune(self, table: Mapping[str, Any], kept: Tensor) -> Recoded:
        parts = {f"parts.{level}": part.prune(table, kept) for level, part in enumerate(self)}
        return Recoded(parts["parts.0"].table, state_with_parts(self, parts))

    def bake(self) -> "Quantizer":
        return Levels([part.bake() for part in self], self.shares)

    def searcher(self) -> Any:
        raise UsageError("a tokenizer of several levels cannot be exported: its finer latents depend on coarser codes")

    def anneal(self, progress: float) -> None:
        for part in self:
            part.anneal(progress)

    def dead_codes(self, seen: Any) -> Any:
        return self.part(0).dead_codes(seen)


def build_levels(table: Mapping[str, Any], shares: tuple[int, ...] | None) -> Quantizer:
    """The quantizer of a table with its kind; one a level where an autoencoder has several (see `Levels`)."""
    options = dict(table)
    kind = options.pop("kind")
    if shares is None:
        return build(kind, options)
    return Levels([build(kind, options) for _ in shares], shares)
