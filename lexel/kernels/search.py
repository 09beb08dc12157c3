"""Best-code search (first version; the contract is final, the speed is not)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["l2", "dot", "cosine"]
TILE = 8192


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor, similarity: Similarity = "l2", implementation: str = "auto") -> Tensor:
    """The index of the best row of codebook (K, D) for each row of z (N, D): int64 (N,).

    Decided in at least float32, under autocast too; ties go to the lowest index.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.to(dtype), codebook.to(dtype)
        if similarity == "cosine":
            codebook = F.normalize(codebook, dim=1)  # the length of z cannot change the winner
        bias = codebook.square().sum(1).mul(-0.5) if similarity == "l2" else codebook.new_zeros(len(codebook))
        best = z.new_full((len(z),), -torch.inf)
        indices = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        for start in range(0, len(codebook), TILE):
            score, index = torch.addmm(bias[start : start + TILE], z, codebook[start : start + TILE].T).max(1)
            better = score > best
            best = torch.where(better, score, best)
            indices = torch.where(better, index + start, indices)
    return indices
