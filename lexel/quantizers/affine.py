"""A table that follows the mean and the covariance of the latents."""

import torch
from torch import Tensor, nn

from lexel.distributed import all_sum
from lexel.quantizers import bounds
from lexel.quantizers.base import Quantized, as_vectors, choose, full_precision
from lexel.quantizers.projected import ProjectedVQ
from lexel.quantizers.running import Recall, recomputing, statistics_move

# Of the sum of all variances, added to every one: more than float32 rounds off a covariance, so that it has a Cholesky
# factor, and a direction without latents still tells codes apart.
FLOOR = 1e-6


class Affine(ProjectedVQ):
    """Codes are an affine map of a trained table, and the map is not learned but measured.

    With running mean m and covariance S = R R^T of the latents, code k is m + R w_k, where w starts at N(0, 1). Before
    the first step the codes are thus spread as the latents are, and when the encoder moves, stretches or turns its
    latents, all codes go along; the loss only has to refine w, code by code. In each step the latents are measured
    first and then choose, so z_q is always what the indices name.

    Commitment weighs 0.1, not VQ's 0.25: at that the latents give up directions that the picture needs.

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
        restart_below: codes that fewer latents a batch choose, on average, start again at latents; 0 is never.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.1}
    batch_dependent = True
    code_tables = ("weight",)

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.99,
        spread: str = "full",
        gradient: str = "straight_through",
        restart_below: float = 0.0,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, gradient)
        self.decay = bounds.decay(decay)
        self.spread = choose("spread", spread, ("full", "channel"))
        self._recall = Recall()
        self._recalled: tuple[Tensor, ...] | None = None  # the statistics of a forward pass that is repeated
        self.weight = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.mean = nn.Buffer(torch.zeros(codebook_dim))
        self.covariance = nn.Buffer(torch.zeros(codebook_dim, codebook_dim).fill_diagonal_(1))
        self.steps = nn.Buffer(torch.zeros((), dtype=torch.int64))  # training batches seen
        self.follow_use(restart_below)

    def _root(self, covariance: Tensor) -> Tensor:
        """R in float64: a triangle (D, D), or the diagonal (D,) for `spread="channel"`."""
        covariance = covariance.double()
        floor = FLOOR * covariance.trace().clamp_min(torch.finfo(torch.float32).tiny)
        covariance = covariance + floor * torch.eye(self.codebook_dim, dtype=floor.dtype, device=floor.device)
        if self.spread == "channel":
            return covariance.diagonal().sqrt()
        # Without a check, which would raise at latents that are NaN: training reports those itself.
        return torch.linalg.cholesky_ex(covariance).L

    def project(self) -> Tensor:
        mean, covariance, *_ = self._recalled or self._statistics()
        root = self._root(covariance).to(mean)
        return mean + (self.weight * root if self.spread == "channel" else self.weight @ root.T)

    def rows_for(self, codes: Tensor) -> Tensor:
        root, centred = self._root(self.covariance), (codes - self.mean).double()
        if self.spread == "channel":
            return (centred / root).to(codes)
        return torch.linalg.solve_triangular(root, centred.T, upper=False).T.to(codes)

    def _statistics(self) -> tuple[Tensor, ...]:
        """The statistics that quantize a batch beside the parameters: mean (D,) and covariance (D, D) first."""
        return self.mean, self.covariance

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        vectors = as_vectors(z.detach())
        moving = self.training and statistics_move(vectors)
        if moving:
            self._follow(vectors)
            self._recall.keep(vectors, *(each.clone() for each in self._statistics()))
        elif self.training and recomputing():
            self._recalled = self._recall.find(vectors)
        try:
            return self._quantized(z, moving)
        finally:
            self._recalled = None

    def _quantized(self, z: Tensor, moving: bool) -> Quantized:
        """Quantizes latents (B, D, *grid) by the table in force; `moving` says whether statistics follow this batch."""
        return super().forward(z)

    @torch.no_grad()
    def _follow(self, vectors: Tensor) -> None:
        """One step of the running mean and covariance on latents (N, D) of every process."""
        vectors = vectors.to(self.mean.dtype)
        # Processes may have different numbers of latents.
        count = all_sum(vectors.new_full((), len(vectors)))
        mean = all_sum(vectors.sum(0)) / count
        centred = vectors - mean
        covariance = all_sum(centred.T @ centred) / count
        self.steps.add_(1)
        rate = (1 / self.steps).clamp_min(1 - self.decay).to(mean)  # a plain mean until it is one of 1 / (1 - decay)
        self.mean.lerp_(mean, rate)
        self.covariance.lerp_(covariance, rate)
