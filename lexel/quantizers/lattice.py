"""Implicit codebooks: the product of a few scalar levels per dimension, with no table to store or search.

A lattice with d dimensions serves latents of D >= d channels: channel c carries dimension c mod d. Latents are
averaged over the channels of a dimension, and a code repeats its value on them. At D = d this is the published form;
at D > d it is the same lattice, repeated, so that every channel counts and codes keep D channels without a projection.
"""

import math

import torch
from torch import Tensor, nn

from lexel.quantizers.base import Advice, Quantizer, as_vectors, full_precision


class Lattice(nn.Module):
    """Digits to indices and back, dimensions to channels and back.

    Args:
        levels: how many values each dimension takes; their product is the number of codes.
        channels: D, at least len(levels).
        low_first: whether dimension 0 holds the lowest digits of the index.
    """

    def __init__(self, levels: tuple[int, ...], channels: int, low_first: bool) -> None:
        super().__init__()
        self.sizes = levels
        steps = [math.prod(levels[:i] if low_first else levels[i + 1 :]) for i in range(len(levels))]
        shares = [len(range(i, channels, len(levels))) for i in range(len(levels))]  # bincount knows no meta device
        dimensions = [channel % len(levels) for channel in range(channels)]
        # Derived from the arguments, so they are no part of the state.
        self.levels = nn.Buffer(torch.tensor(levels), persistent=False)  # (d,)
        self.steps = nn.Buffer(torch.tensor(steps), persistent=False)  # (d,) what one digit adds to the index
        self.dimension_of_channel = nn.Buffer(torch.tensor(dimensions), persistent=False)  # (D,)
        self.channels_per_dimension = nn.Buffer(torch.tensor(shares), persistent=False)  # (d,)
        self.one = nn.Buffer(torch.ones(()), persistent=False)  # 1, in the precision that codes have

    def index(self, digits: Tensor) -> Tensor:
        """int64 (...,) from digits (..., d)."""
        return (digits.long() * self.steps).sum(-1)

    def digits(self, indices: Tensor) -> Tensor:
        """int64 (..., d) from indices (...,)."""
        return indices[..., None] // self.steps % self.levels

    def mean_channels(self, vectors: Tensor) -> Tensor:
        """The mean over the channels of each dimension: (N, d) from (N, D)."""
        if len(self.dimension_of_channel) == len(self.levels):
            return vectors
        sums = vectors.new_zeros(vectors.shape[0], len(self.levels)).index_add(1, self.dimension_of_channel, vectors)
        return sums / self.channels_per_dimension

    def repeat_channels(self, values: Tensor) -> Tensor:
        """Values (..., d) on all channels: (..., D)."""
        return values[..., self.dimension_of_channel]


class LatticeQuantizer(Quantizer):
    """A quantizer whose codes follow from the digits of their index. A subclass sets `lattice` and writes both ends.

    Attributes:
        lattice: the levels of each dimension.
    """

    straight_through = True  # past the rounding; FSQ's gradient still goes through its tanh, BSQ's through its norm
    stores_table = False
    code_tables = ()
    advice = Advice(
        "the latents sit on one side of the lattice's thresholds",
        "raise the weight of the entropy terms (fsq has none: widen the latents with a norm before the quantizer)",
    )
    comparable_norms = False  # the codes are where they are, and latents of any length choose them
    lattice: Lattice

    def values(self, digits: Tensor) -> Tensor:
        """The value in each dimension, (..., d), of digits (..., d)."""
        raise NotImplementedError

    def choose(self, vectors: Tensor) -> Tensor:
        """The index of each row of latents (N, D): int64 (N,)."""
        raise NotImplementedError

    @property
    def codebook(self) -> Tensor:
        return self.codes(torch.arange(self.codebook_size, device=self.lattice.levels.device))

    def codes(self, indices: Tensor) -> Tensor:
        """Codes (..., D) of indices (...,)."""
        return self.lattice.repeat_channels(self.values(self.lattice.digits(indices)))

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.codes(indices).movedim(-1, 1)

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        return self.choose(as_vectors(z)).view(z.shape[0], *z.shape[2:])

    def searcher(self) -> nn.Module:
        return self  # arithmetic on every channel, with nothing to search


def sample_entropy(log_p: list[Tensor]) -> Tensor:
    """The mean entropy in nats of a row's code, from independent dimensions: one log_p (N, levels) a dimension.

    Entropies of independent dimensions add, so this is exact at any number of codes.
    """
    return torch.stack([-(p.exp() * p).sum(1).mean() for p in log_p]).sum()


def mean_distribution(log_p: list[Tensor]) -> Tensor:
    """The mean over rows of the distribution over codes, as a matrix whose entries are the codes.

    A row's distribution is the outer product of its dimensions', so the mean over N rows is A^T B / N with A and B
    the distributions over the two halves of the dimensions: K numbers, and two tensors of about N x sqrt(K).

    Args:
        log_p: one (N, levels) a dimension.
    """
    certain = torch.zeros_like(log_p[0][:, :1])
    half = len(log_p) // 2
    first, second = _joint(certain, log_p[:half]), _joint(certain, log_p[half:])
    return first.T @ second / len(second)


def entropy(mean: Tensor, epsilon: float) -> Tensor:
    """The entropy in nats of a distribution of any shape; epsilon is added inside the logarithm."""
    return -(mean * (mean + epsilon).log()).sum()


def _joint(joint: Tensor, log_p: list[Tensor]) -> Tensor:
    """The joint distribution (N, product of levels) of independent dimensions, from log-certainty (N, 1)."""
    for p in log_p:
        joint = (joint[:, :, None] + p[:, None]).flatten(1)
    return joint.exp()
