"""Gumbel-softmax quantization (https://arxiv.org/abs/1611.01144), as in the dVAE of DALL-E
(https://arxiv.org/abs/2102.12092).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.kernels import nearest
from lexel.quantizers.annealed import Annealed
from lexel.quantizers.base import MatrixSearch, Quantized, Quantizer, as_grid, as_vectors, full_precision


class Gumbel(Annealed):
    """A linear layer gives one logit a code; training samples a code from them, evaluation takes the largest.

    The sample's gradient is that of softmax((logits + noise) / tau), in which all codes appear: this method needs
    an N x K tensor by its definition. `kl` is the divergence from the uniform distribution over codes, in nats.

        gumbel = Gumbel(codebook_size=8192, codebook_dim=128)
        gumbel.anneal(step / steps)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        tau_start: temperature at progress 0; it falls along half a cosine.
        tau_end: temperature at progress 1, above 0; DALL-E ends at 1/16.
        hard: whether training uses the sampled code with the softmax's gradient, or the average under the softmax.
    """

    LOSS_WEIGHTS = {"kl": 5e-4}
    batch_dependent = True  # on noise
    code_tables = ("weight", "logits.weight", "logits.bias")
    why_fixed = "a layer of its own chooses the codes, and knows none for new ones"

    def __init__(
        self, codebook_size: int, codebook_dim: int, tau_start: float = 1.0, tau_end: float = 1 / 16, hard: bool = True
    ) -> None:
        super().__init__(codebook_size, codebook_dim, tau_start, tau_end)
        self.hard = hard
        self.logits = nn.Linear(codebook_dim, codebook_size)
        self.weight = nn.Parameter(torch.randn(codebook_size, codebook_dim))

    def bake(self) -> Quantizer:
        raise UsageError(
            "Gumbel chooses by a layer of its own, not by its codes: no search in the table gives its indices"
        )

    def searcher(self) -> nn.Module:
        return MatrixSearch(self.codebook, self.logits.weight, self.logits.bias)

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        # The layer's bias is one more channel, so that the search needs no N x K tensor.
        vectors = torch.cat([as_vectors(z), z.new_ones(z.numel() // z.shape[1], 1)], 1)
        keys = torch.cat([self.logits.weight, self.logits.bias[:, None]], 1)
        return nearest(vectors, keys, "dot").view(z.shape[0], *z.shape[2:])

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        weight, bias, codebook = (part.to(z.dtype) for part in (self.logits.weight, self.logits.bias, self.weight))
        logits = F.linear(as_vectors(z), weight, bias)  # (N, K)
        log_p = logits.log_softmax(1)
        losses = {"kl": (log_p.exp() * (log_p + math.log(self.codebook_size))).sum(1).mean()}
        if not self.training:
            indices = self.assign(z)
            return Quantized(self.indices_to_codes(indices).to(z.dtype), indices, losses)
        noise = -torch.empty_like(logits).exponential_().log()
        p = ((logits + noise) / self.temperature).softmax(1)
        rows = p.argmax(1)
        codes = p @ codebook
        if self.hard:
            # The one-hot's codes in value and for the table; the softmax's gradient for the logits, 0 in value.
            codes = F.embedding(rows, codebook) + (p - p.detach()) @ codebook.detach()
        return Quantized(as_grid(codes, z), rows.view(z.shape[0], *z.shape[2:]), losses)
