"""A plain table of codes: what every quantizer with a table becomes when it is baked."""

from typing import Self

import torch
from torch import Tensor

from lexel.quantizers.base import Quantized, Quantizer, choose, full_precision, lookup, straight_through


class Table(Quantizer):
    """A fixed table and the similarity that searches it. It learns nothing and returns no loss terms.

        table = quantizer.bake()
        z_q, indices, _ = table(z)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        similarity: "l2", "dot" or "cosine".
    """

    def __init__(self, codebook_size: int, codebook_dim: int, similarity: str = "l2") -> None:
        super().__init__(codebook_size, codebook_dim)
        self.similarity = choose("similarity", similarity, ("l2", "dot", "cosine"))
        self.gradient = "straight_through"
        self.register_buffer("weight", torch.zeros(codebook_size, codebook_dim))  # filled by `of` or by a checkpoint
        self.weight: Tensor

    @classmethod
    def of(cls, codebook: Tensor, similarity: str = "l2") -> Self:
        """A table that holds a copy of `codebook` (K, D)."""
        table = cls(codebook.shape[0], codebook.shape[1], similarity)
        table.weight = codebook.detach().clone()
        return table.eval()

    @property
    def codebook(self) -> Tensor:
        return self.weight

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        indices = self.assign(z)
        return Quantized(straight_through(z, lookup(indices, self.weight).movedim(-1, 1)), indices, {})
