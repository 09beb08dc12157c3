"""Implicit codebooks: the product of a few scalar levels per dimension, with no table to store or search.

A lattice with d dimensions serves latents of D >= d channels: channel c carries dimension c mod d. Latents are
averaged over the channels of a dimension, and a code repeats its value on them. At D = d this is the published form;
at D > d it is the same lattice, repeated, so that every channel counts and codes keep D channels without a projection.
"""

import math

import torch
from torch import Tensor, nn

from lexel.distributed import mean_over_processes


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
        copies = [channels // len(levels) + (i < channels % len(levels)) for i in range(len(levels))]
        # Derived from the arguments, so they are no part of the state.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("steps", torch.tensor(steps), persistent=False)
        self.register_buffer("carrier", torch.arange(channels) % len(levels), persistent=False)
        copies = [len(range(i, channels, len(levels))) for i in range(len(levels))]  # bincount knows no meta device
        self.register_buffer("copies", torch.tensor(copies), persistent=False)
        self.register_buffer("unit", torch.ones(()), persistent=False)
        self.levels: Tensor  # (d,)
        self.steps: Tensor  # (d,) what one digit adds to the index
        self.carrier: Tensor  # (D,) the dimension that a channel carries
        self.copies: Tensor  # (d,) how many channels carry a dimension
        self.unit: Tensor  # 1, in the precision that codes have

    def index(self, digits: Tensor) -> Tensor:
        """int64 (...,) from digits (..., d)."""
        return (digits.long() * self.steps).sum(-1)

    def digits(self, indices: Tensor) -> Tensor:
        """int64 (..., d) from indices (...,)."""
        return indices[..., None] // self.steps % self.levels

    def pool(self, vectors: Tensor) -> Tensor:
        """The mean over the channels of each dimension: (N, d) from (N, D)."""
        if len(self.carrier) == len(self.levels):
            return vectors
        sums = vectors.new_zeros(vectors.shape[0], len(self.levels)).index_add(1, self.carrier, vectors)
        return sums / self.copies

    def spread(self, values: Tensor) -> Tensor:
        """Values (..., d) on all channels: (..., D)."""
        return values[..., self.carrier]


def sample_entropy(log_p: list[Tensor]) -> Tensor:
    """The mean entropy in nats of a row's code, from independent dimensions: one log_p (N, levels) a dimension.

    Entropies of independent dimensions add, so this is exact at any number of codes.
    """
    return torch.stack([-(p.exp() * p).sum(1).mean() for p in log_p]).sum()


def batch_entropy(log_p: list[Tensor], epsilon: float) -> Tensor:
    """The entropy in nats of the mean distribution over codes, over all processes' rows.

    A row's distribution is the outer product of its dimensions', so the mean over N rows is A^T B / N with A and B
    the distributions over the two halves of the dimensions: K numbers, and two tensors of about N x sqrt(K).

    Args:
        log_p: one (N, levels) a dimension.
        epsilon: added inside the logarithm.
    """
    certain = torch.zeros_like(log_p[0][:, :1])
    half = len(log_p) // 2
    first, second = _joint(certain, log_p[:half]), _joint(certain, log_p[half:])
    mean = mean_over_processes(first.T @ second / len(second))
    return -(mean * (mean + epsilon).log()).sum()


def _joint(joint: Tensor, log_p: list[Tensor]) -> Tensor:
    """The joint distribution (N, product of levels) of independent dimensions, from log-certainty (N, 1)."""
    for p in log_p:
        joint = (joint[:, :, None] + p[:, None]).flatten(1)
    return joint.exp()
