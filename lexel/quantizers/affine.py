"""A table that follows the mean and the covariance of the latents."""

import torch
from torch import Tensor, nn

from lexel.distributed import all_sum, processes
from lexel.errors import UsageError
from lexel.quantizers.base import Quantized, as_vectors, choose, full_precision
from lexel.quantizers.projected import ProjectedVQ

# Of the sum of all variances, added to every one: more than float32 rounds off a covariance, so that it has a Cholesky
# factor, and a direction without latents still tells codes apart.
FLOOR = 1e-6


class Affine(ProjectedVQ):
    """Codes are an affine map of a trained table, and the map is not learned but measured.

    With running mean m and covariance S = R R^T of the latents, code k is m + R w_k, where w starts at N(0, 1). Before
    the first step the codes are thus spread as the latents are, and when the encoder moves, stretches or turns its
    latents, all codes go along; the loss only has to refine w, code by code. In each step the latents are measured
    first and then choose, so z_q is always what the indices name.

    The map for each channel by itself (`spread="channel"`) is the affine parametrization of
    https://arxiv.org/abs/2305.08842; the covariance is Lexel's
    (evidence: docs/studies/which-quantizer.md).

        Affine(codebook_size=16384, codebook_dim=32)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        decay: of the running mean and covariance.
        spread: "full", R is the Cholesky factor of S; or "channel", the square roots of its diagonal.
        gradient: "straight_through" or "rotation".
    """

    batch_dependent = True

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.99,
        spread: str = "full",
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, gradient)
        if not 0 <= decay < 1:
            raise UsageError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.spread = choose("spread", spread, ("full", "channel"))
        self.weight = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.register_buffer("mean", torch.zeros(codebook_dim))
        self.register_buffer("covariance", torch.eye(codebook_dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training batches seen
        self.mean: Tensor
        self.covariance: Tensor
        self.steps: Tensor

    def project(self) -> Tensor:
        covariance = self.covariance.double()
        floor = FLOOR * covariance.trace().clamp_min(torch.finfo(torch.float32).tiny)
        covariance = covariance + floor * torch.eye(self.codebook_dim).to(floor)
        if self.spread == "channel":
            return self.mean + self.weight * covariance.diagonal().sqrt().to(self.mean)
        # Without a check, which would raise at latents that are NaN: training has a clear word for those.
        root = torch.linalg.cholesky_ex(covariance).L.to(self.mean)
        return self.mean + self.weight @ root.T

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        if self.training:
            self._follow(as_vectors(z.detach()))
        return super().forward(z)

    @torch.no_grad()
    def _follow(self, vectors: Tensor) -> None:
        """One step of the running mean and covariance on latents (N, D) of every process."""
        vectors = vectors.to(self.mean.dtype)
        count = len(vectors) * processes()
        mean = all_sum(vectors.sum(0)) / count
        centred = vectors - mean
        covariance = all_sum(centred.T @ centred) / count
        self.steps += 1
        rate = (1 / self.steps).clamp_min(1 - self.decay).to(mean)  # a plain mean until it is one of 1 / (1 - decay)
        self.mean.lerp_(mean, rate)
        self.covariance.lerp_(covariance, rate)
