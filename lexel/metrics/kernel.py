"""Distances by kernels: the kernel inception distance (https://arxiv.org/abs/1801.01401), unbiased, for small samples;
and the Gaussian one of CMMD (https://arxiv.org/abs/2401.09603).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError


class KernelDistance(NamedTuple):
    """The kernel distance of two sets of features, and how sure it is."""

    mean: float
    standard_error: float  # of the mean over subsets; NaN for one subset


def polynomial_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared mean discrepancy of features (n, D) and (m, D) under (x.y / D + 1)^3; it may be negative."""
    dim = a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / dim + 1).pow(3)

    def mean_of_pairs(x: Tensor) -> Tensor:  # a sample is no pair of its own
        matrix = kernel(x, x)
        return (matrix.sum() - matrix.diagonal().sum()) / (len(x) * (len(x) - 1))

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean()


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> KernelDistance:
    """Mean of `polynomial_mmd` over random subsets of features (N, D) and (M, D), in float64.

    Args:
        subsets: number of subsets; 100 in published code.
        size: samples in each, drawn without replacement from both sides; at most what there is.
        seed: decides the subsets.
    """
    if min(len(a), len(b)) < 2:
        raise UsageError(f"a kernel distance needs at least two samples a side, got {len(a)} and {len(b)}")
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"the features differ in length: {a.shape[1]} and {b.shape[1]}; use one network for both")
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:size]
        rows_b = torch.randperm(len(b), generator=generator)[:size]
        values.append(polynomial_mmd(a[rows_a].double(), b[rows_b].double()))
    values_ = torch.stack(values)
    error = float(values_.std() / subsets**0.5) if subsets > 1 else float("nan")
    return KernelDistance(float(values_.mean()), error)


def gaussian_mmd(a: Tensor, b: Tensor, sigma: float = 10.0, scale: float = 1000.0, block: int = 4096) -> float:
    """Squared mean discrepancy of features (N, D) and (M, D), brought to unit length, under a Gaussian kernel.

    CMMD's: exp(-|x - y|^2 / (2 sigma^2)), pairs of a point with itself included, times `scale`. In float64, block by
    block, so that no N x M matrix exists.

    Raises:
        UsageError: the features differ in length, or a side is empty.
    """
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"the features differ in length: {a.shape[1]} and {b.shape[1]}; use one network for both")
    if not len(a) or not len(b):
        raise UsageError(f"a kernel distance needs samples on both sides, got {len(a)} and {len(b)}")
    x, y = (torch.nn.functional.normalize(side.double(), dim=1, eps=1e-12) for side in (a, b))

    def mean(left: Tensor, right: Tensor) -> float:
        total = left.new_zeros(())
        for rows in left.split(block):
            for columns in right.split(block):
                squares = rows.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * rows @ columns.T
                total += (-squares / (2 * sigma**2)).exp().sum()
        return float(total) / (len(left) * len(right))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
