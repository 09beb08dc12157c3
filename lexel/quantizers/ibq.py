"""Index Backpropagation Quantization (https://arxiv.org/abs/2412.02692)."""

import torch
from torch import Tensor, nn

from lexel.kernels import index_backpropagation, nearest
from lexel.quantizers.base import Quantized, Quantizer, as_vectors


class IBQ(Quantizer):
    """Puts the straight-through estimator on the one-hot over all codes, so that every code learns.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
    """

    LOSS_WEIGHTS = {
        "quantization": 1.0,
        "commitment": 1.0,
        "codebook": 0.25,
        "entropy_sample": 0.05,
        "entropy_batch": -0.05,
    }

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__(codebook_size, codebook_dim)
        # Unit variance matters: the encoder's gradient is the covariance of the codes times the decoder's gradient.
        self.weight = nn.Parameter(torch.randn(codebook_size, codebook_dim))

    @property
    def codebook(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        return nearest(as_vectors(z), self.codebook, "dot").view(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Quantized:
        z_q, indices, terms = index_backpropagation(as_vectors(z), self.weight)
        grid = (z.shape[0], *z.shape[2:])
        return Quantized(z_q.view(*grid, -1).movedim(-1, 1), indices.view(grid), terms)
