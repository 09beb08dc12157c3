"""Vector quantization: the nearest entry of a learned table (https://arxiv.org/abs/1711.00937)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.kernels import nearest
from lexel.quantizers.base import Quantized, Quantizer, as_vectors, straight_through


class VQ(Quantizer):
    """Picks the code at the smallest Euclidean distance; only chosen codes learn.

    The published VQGAN code swaps the two loss weights (0.25 on `codebook`, 1 on `commitment`); the defaults
    here are the paper's.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.weight = nn.Parameter(torch.empty(codebook_size, codebook_dim).uniform_(-1, 1) / codebook_size)

    @property
    def codebook(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        return nearest(as_vectors(z), self.codebook).view(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Quantized:
        indices = self.assign(z)
        z_q = self.indices_to_codes(indices)
        losses = {
            "codebook": F.mse_loss(z_q, z.detach()),  # moves the codes to the latents
            "commitment": F.mse_loss(z, z_q.detach()),  # keeps the latents near their codes
        }
        return Quantized(straight_through(z, z_q), indices, losses)
