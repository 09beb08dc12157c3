"""Quantizers with an annealed temperature: the base of Soft VQ and Gumbel."""

import torch
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.base import Quantizer, cosine_decay


class Annealed(Quantizer):
    """A quantizer whose temperature falls along half a cosine as `anneal` is told.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        tau_start: temperature at progress 0, above 0.
        tau_end: temperature at progress 1, above 0.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, tau_start: float, tau_end: float) -> None:
        super().__init__(codebook_size, codebook_dim)
        if not (tau_start > 0 and tau_end > 0):
            raise UsageError(f"tau_start and tau_end must be above 0, got {tau_start} and {tau_end}")
        self.tau_start = bounds.temperature("tau_start", tau_start)
        self.tau_end = bounds.temperature("tau_end", tau_end)
        self.progress = nn.Buffer(torch.zeros(()))

    @property
    def temperature(self) -> Tensor:
        """tau now: a scalar."""
        return cosine_decay(self.tau_start, self.tau_end, self.progress)

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        self.progress.fill_(progress)
