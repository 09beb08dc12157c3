"""The Fréchet distance between Gaussians fitted to features (FID, https://arxiv.org/abs/1706.08500), in float64.

|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2). The last trace is taken from a symmetric matrix: with S2 = F F^T the
eigenvalues of S1 S2 are those of F^T S1 F, which is positive semi-definite, so no complex square root and no scipy
are needed. Features of FID's Inception give FID; of any other network, a number with that network's name.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.metrics.moments import Moments


class FrechetTerms(NamedTuple):
    """A Fréchet distance and its parts."""

    distance: float
    mean: float  # |m1 - m2|^2
    covariance: float  # tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2)
    clipped: float  # negative eigenvalues set to zero, as a share of the traces: above 1e-6 a covariance is damaged


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance between two samples' moments."""
    return frechet_terms(a, b).distance


def frechet_terms(a: Moments, b: Moments, factor_of_b: Tensor | None = None) -> FrechetTerms:
    """The Fréchet distance with its parts; `factor_of_b` is `factor(b)` where it is already at hand.

    Raises:
        UsageError: the dimensions differ, or a statistic is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"the features differ in length: {len(a.mean)} and {len(b.mean)}; use one network for both")
    for part in (a.mean, a.covariance, b.mean, b.covariance):
        if not part.isfinite().all():
            raise UsageError("the statistics hold values that are not finite; compute them again")
    half = factor(b) if factor_of_b is None else factor_of_b
    eigenvalues = torch.linalg.eigvalsh(_symmetric(half.T @ a.covariance.double() @ half))
    # n samples span n - 1 directions: the other eigenvalues are zero but for rounding, and a square root would turn
    # 1e-16 of rounding into 1e-8 a direction.
    kept = eigenvalues[-_rank(a) :]
    trace_of_root = kept.clamp(min=0).sqrt().sum()
    traces = a.covariance.diagonal().sum() + b.covariance.diagonal().sum()
    clipped = (traces.new_zeros(()) - kept.clamp(max=0)).clamp(min=0).sqrt().sum() + _negative(b.covariance, half)
    mean = (a.mean.double() - b.mean.double()).square().sum()
    covariance = traces - 2 * trace_of_root
    share = clipped / traces if traces > 0 else traces.new_zeros(())
    return FrechetTerms(float(mean + covariance), float(mean), float(covariance), float(share))


def factor(moments: Moments) -> Tensor:
    """F (D, r) with F F^T equal to the covariance, r = min(D, n - 1); negative eigenvalues count as zero."""
    eigenvalues, vectors = torch.linalg.eigh(_symmetric(moments.covariance.double()))
    rank = _rank(moments)
    return vectors[:, -rank:] * eigenvalues[-rank:].clamp(min=0).sqrt()


def frechet_distance_of_features(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between features (N, D) and (M, D) themselves: quick where N or M is below D.

    tr((S1 S2)^1/2) is the nuclear norm of the N x M matrix of inner products of centred features, so that no D x D
    matrix is ever built: 1.8 s against 20 s for 1,000 features of 2,048.
    """
    rows = [side.double() - side.double().mean(0) for side in (a, b)]
    x, y = (side / (len(side) - 1) ** 0.5 for side in rows)
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return float(mean + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())


def _rank(moments: Moments) -> int:
    dim = len(moments.mean)
    return dim if moments.n is None else min(dim, moments.n - 1)


def _negative(covariance: Tensor, half: Tensor) -> Tensor:
    """The eigenvalues that `factor` clipped: |F|^2 is the sum of those it kept, the trace is the sum of all."""
    return (half.square().sum() - covariance.double().diagonal().sum()).clamp(min=0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
