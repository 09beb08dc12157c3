"""The contract every quantizer keeps: latents in, codes out."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lexel.errors import UsageError


class Quantized(NamedTuple):
    """The result of quantizing a grid of latents."""

    z_q: Tensor  # (B, D, *grid), the chosen codes; gradients as the method says
    indices: Tensor  # (B, *grid) int64 in [0, codebook_size); (B, Q, *grid) for residual and product
    losses: dict[str, Tensor]  # unweighted scalar terms; the recipe weighs them


class Quantizer(nn.Module):
    """A vocabulary of codes for grids of latents.

    Latents are (B, D, *grid) with any number of grid axes. A subclass implements `forward`, `assign` and the
    property `codebook`; `indices_to_codes` follows from the codebook unless there is a cheaper way.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
    """

    LOSS_WEIGHTS: ClassVar[Mapping[str, float]] = {}  # every term `forward` returns, with its published weight

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        if codebook_size < 2:
            raise UsageError(f"codebook_size must be at least 2, got {codebook_size}")
        if codebook_dim < 1:
            raise UsageError(f"codebook_dim must be at least 1, got {codebook_dim}")
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim

    @property
    def codebook(self) -> Tensor:
        """The table in force, after any projection: (K, D)."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes latents (B, D, *grid)."""
        raise NotImplementedError

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        """The index of each latent, without losses: int64 (B, *grid) for z (B, D, *grid)."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes that indices (B, *grid) name: (B, D, *grid)."""
        return lookup(indices, self.codebook).movedim(-1, 1)

    def anneal(self, progress: float) -> None:
        """Told before every training step how far training is, in [0, 1]; for schedules inside a method."""

    def loss(self, losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of the terms; weights default to LOSS_WEIGHTS.

        Raises:
            UsageError: a term has no weight.
        """
        return weighted_sum(losses, self.LOSS_WEIGHTS if weights is None else weights)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum of weights[name] * losses[name]; a term without a weight is an error, a weight without a term is not."""
    for name in losses:
        if name not in weights:
            raise UsageError(f"no weight for the loss term {name!r}; write {name} = 0 to switch it off")
    total = sum(weights[name] * term for name, term in losses.items() if weights[name] != 0)
    return torch.as_tensor(total)


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """Rows of codebook (K, D) named by indices of any shape: (*indices.shape, D)."""
    return nn.functional.embedding(indices, codebook)


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q in value (to the bit), z in gradient."""
    return z_q.detach() + (z - z.detach())


def as_vectors(z: Tensor) -> Tensor:
    """Latents (B, D, *grid) as rows (B * prod(grid), D)."""
    return z.movedim(1, -1).flatten(0, -2)
