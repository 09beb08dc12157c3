"""Lookup-free quantization: a code is the signs of the latent (MAGVIT-v2 https://arxiv.org/abs/2310.05737,
Open-MAGVIT2 https://arxiv.org/abs/2409.04410).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.distributed import mean_over_processes
from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.base import GRADIENTS, Quantized, as_grid, as_vectors, choose, full_precision
from lexel.quantizers.lattice import Lattice, LatticeQuantizer, entropy, mean_distribution, sample_entropy
from lexel.quantizers.statistics import Groups, Statistics, check_statistics, groups

JOINT = 2**28  # codes whose mean distribution is held at once


class LFQ(LatticeQuantizer):
    """The code of a latent is its signs, the index is their bits; zero counts as -1.

    Published for D = log2 K, one bit a channel. With more channels the bits repeat over them (see `lattice`), with
    fewer a channel holds several bits as evenly spaced levels, 1 apart at two bits, 1/2 at three.

    Both entropies are exact and cost no N x K tensor: for a latent the bits are independent given
    p(code) = softmax(2 z.c / temperature) (softmax of -|z - c|^2 / temperature where a channel has more levels),
    so their entropies add; the mean over latents is a product of two small matrices.

        LFQ(codebook_size=2**18, codebook_dim=18)

    Args:
        codebook_size: number of codes, K, a power of two.
        codebook_dim: length of a code, D; log2 K is the published choice.
        temperature: of the entropies' softmax.
        bit_order: "low_first" (channel 0 is the lowest bit, Open-MAGVIT2) or "high_first" (Cosmos, BSQ).
        group_bits: the batch entropy is summed over groups of this many dimensions instead of taken jointly over
            all; None is exact.
        epsilon: inside the logarithm of the batch entropy; 1e-5 is the released code's.
        gradient: "straight_through" or "rotation".
        statistics: the images over which a batch entropy is taken. "process": the batch of each process, as in the
            released code; a number: that many, with the same result on any number of processes; "global": the batches
            of all processes.
    """

    LOSS_WEIGHTS = {"commitment": 0.25, "entropy_sample": 0.1, "entropy_batch": -0.1}

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        temperature: float = 0.01,
        bit_order: str = "low_first",
        group_bits: int | None = None,
        epsilon: float = 1e-5,
        gradient: str = "straight_through",
        statistics: Statistics = "process",
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        bits = codebook_size.bit_length() - 1
        if codebook_size != 2**bits:
            raise UsageError(f"codes of signs come in powers of two, got codebook_size {codebook_size}; try {2**bits}")
        self.temperature = bounds.temperature("temperature", temperature)
        self.group_bits = None if group_bits is None else bounds.integer("group_bits", group_bits, 1, 64)
        self.epsilon = bounds.number("epsilon", epsilon, 0, 1)
        self.statistics = check_statistics(statistics)
        self.gradient = choose("gradient", gradient, GRADIENTS)
        dimensions = min(bits, codebook_dim)
        levels = tuple(2 ** (bits // dimensions + (i < bits % dimensions)) for i in range(dimensions))
        largest = max(math.prod(levels[i : i + (group_bits or dimensions)]) for i in range(dimensions))
        if largest > JOINT:
            raise UsageError(
                f"the batch entropy over {codebook_size} codes needs {largest} numbers; "
                f"group_bits = {min(9, dimensions)} sums it over groups of dimensions"
            )
        low_first = choose("bit_order", bit_order, ("low_first", "high_first")) == "low_first"
        self.lattice = Lattice(levels, codebook_dim, low_first)
        self.scale = 1.0  # the value of a single bit

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        return super().assign(self._prepare(z))

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        z = self._prepare(z)
        vectors = as_vectors(z)
        indices = self.choose(vectors.detach())
        z_q = as_grid(self.codes(indices).to(z.dtype), z)
        log_p = self._log_p(vectors)
        losses = {
            "commitment": self._commitment(z, z_q),
            "entropy_sample": sample_entropy(log_p),  # low where latents are sure of their code
            "entropy_batch": self._batch_entropy(log_p, groups(self.statistics, z.shape[0], self.training)),
        }
        return Quantized(self._pass_gradient(z, z_q), indices.view(z.shape[0], *z.shape[2:]), losses)

    def values(self, digits: Tensor) -> Tensor:
        """The levels in a channel: -1 and 1 for one bit; -1.5, -0.5, 0.5, 1.5 for two."""
        return self.scale * self.lattice.one * (2 * digits + 1 - self.lattice.levels) / (self.lattice.levels // 2)

    def choose(self, vectors: Tensor) -> Tensor:
        """The nearest code's index (N,) for latents (N, D); a tie goes to the lower level."""
        half = self.lattice.levels // 2
        digits = (self.lattice.mean_channels(vectors) * half / (2 * self.scale)).ceil() - 1 + half
        return self.lattice.index(torch.minimum(digits.clamp_min(0), self.lattice.levels - 1))

    def _prepare(self, z: Tensor) -> Tensor:
        return z

    def _commitment(self, z: Tensor, z_q: Tensor) -> Tensor:
        return F.mse_loss(z, z_q)

    def _pass_gradient(self, z: Tensor, z_q: Tensor) -> Tensor:
        """z_q in value, with the gradient that the method gives z."""
        return GRADIENTS[self.gradient](z, z_q)

    def _batch_entropy(self, log_p: list[Tensor], images: Groups) -> Tensor:
        """The entropy of the mean distribution, summed over groups of dimensions, averaged over groups of images."""
        size = self.group_bits or len(log_p)
        terms = []
        for i in range(0, len(log_p), size):
            for rows in zip(*(p.chunk(images.parts) for p in log_p[i : i + size]), strict=True):
                mean = mean_over_processes(mean_distribution(list(rows)), len(rows[0]), images.together)
                terms.append(entropy(mean, self.epsilon))
        return torch.stack(terms).sum() / images.parts

    def _log_p(self, vectors: Tensor) -> list[Tensor]:
        """For each dimension the log-probabilities (N, levels) of its levels."""
        pooled = self.lattice.mean_channels(vectors)
        log_p = []
        for i, levels in enumerate(self.lattice.sizes):
            digits = torch.arange(levels, device=vectors.device)
            values = self.scale * (2 * digits + 1 - levels).to(vectors.dtype) / (levels // 2)  # (levels,)
            # |z - c|^2 over the channels that carry this dimension, without the part that all levels share
            logits = (2 * pooled[:, i : i + 1] * values - values.square()) * self.lattice.channels_per_dimension[i]
            log_p.append((logits / self.temperature).log_softmax(1))
        return log_p
