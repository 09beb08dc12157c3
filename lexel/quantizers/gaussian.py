"""Continuous latents held near a normal distribution: the variational autoencoder of latent diffusion
(https://arxiv.org/abs/2112.10752) and of TiTok's continuous tokens (https://arxiv.org/abs/2501.07730).
"""

import torch
from torch import Tensor

from lexel.quantizers.base import Quantized, full_precision
from lexel.quantizers.continuous import Continuous


class Gaussian(Continuous):
    """No codes: latents are a mean and a log variance, of which one is drawn in training; evaluation takes the mean.

    Built by the kind "gaussian". Whatever needs codes raises UsageError, as for `Continuous`.

        z_q, _, losses = Gaussian(codebook_dim=16)(torch.randn(2, 32, 8, 8))  # z_q (2, 16, 8, 8)

    Args:
        codebook_dim: channels of z_q, D; latents have 2 D: means, then log variances (clamped to [-30, 20]).
    """

    LOSS_WEIGHTS = {"kl": 1e-6}  # to the standard normal distribution, summed over an image's latents

    @property
    def latent_dim(self) -> int:
        return 2 * self.codebook_dim

    def latents_to_decode(self, z: Tensor) -> Tensor:
        """The means (B, D, *grid) of latents (B, 2 D, *grid)."""
        return z[:, : self.codebook_dim]

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        return self.draw(z, torch.randn_like(z[:, : self.codebook_dim]) if self.training else None)

    def draw(self, z: Tensor, noise: Tensor | None) -> Quantized:
        """Latents (B, 2 D, *grid) with the normal numbers (B, D, *grid) to draw by; None takes the mean."""
        mean, log_variance = z.chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / max(1, len(z))
        z_q = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        indices = torch.zeros(len(z), *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(z_q, indices, {"kl": kl})
