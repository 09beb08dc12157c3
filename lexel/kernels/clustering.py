"""Codes from latents: random rows of a batch, and k-means."""

import torch
from torch import Tensor

from lexel.kernels.nearest import nearest


@torch.no_grad()
def pick_rows(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different rows of vectors (N, D); where N is smaller, rows repeat with noise of 1 % of their spread."""
    order = torch.randperm(len(vectors), generator=generator)
    if count <= len(vectors):
        return vectors[order[:count].to(vectors.device)]
    rows = vectors[order.repeat(-(-count // len(vectors)))[:count].to(vectors.device)]
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return rows + 0.01 * vectors.std(correction=0) * noise


@torch.no_grad()
def kmeans(vectors: Tensor, count: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on vectors (N, D) from random rows: centres (count, D) and how many rows each has, int64.

    A centre that no row is nearest to stays where it is.
    """
    centres = pick_rows(vectors, count, torch.Generator().manual_seed(0))
    members = torch.zeros(count, dtype=torch.int64, device=vectors.device)
    for _ in range(iterations):
        indices = nearest(vectors, centres)
        members = torch.bincount(indices, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, indices, vectors)
        centres = torch.where(members[:, None] > 0, sums / members.clamp_min(1)[:, None], centres)
    return centres, members
