"""Improved precision and recall, https://arxiv.org/abs/1904.06991, with the conventions of the ADM evaluator.

A sample set's manifold is the union of balls around its features, each reaching to the k-th nearest neighbour.
Precision is the share of samples inside the reference's manifold, recall the share of references inside the samples'.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError


class PrecisionRecall(NamedTuple):
    """Improved precision and recall, each in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3, block: int = 4096) -> PrecisionRecall:
    """Precision and recall of features (N, D) against reference features (M, D), in the type of the features.

    Distances are taken block by block: 50,000 x 50,000 never exists, at most 3 * block^2 numbers do.

    Args:
        reference: features of real images; the ADM evaluator takes 10,000.
        samples: features of generated images; all of them.
        k: neighbour that the radius reaches to, the point itself not counted.
        block: rows and columns of distances at a time.

    Raises:
        UsageError: fewer than k + 1 points on a side, or features of different length.
    """
    if reference.shape[1] != samples.shape[1]:
        raise UsageError(f"the features differ in length: {reference.shape[1]} and {samples.shape[1]}")
    if min(len(reference), len(samples)) <= k:
        raise UsageError(f"precision and recall need more than k = {k} points, got {len(reference)} and {len(samples)}")
    # Distances do not change when all points move together, and |x|^2 + |y|^2 - 2 x.y loses fewest digits near zero.
    centre = reference.mean(0)
    reference, samples = reference - centre, samples - centre
    reference_radii, sample_radii = radii(reference, k, block), radii(samples, k, block)
    samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    references_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows in _blocks(len(samples), block):
        for columns in _blocks(len(reference), block):
            distances = squared_distances(samples[rows], reference[columns])
            samples_inside[rows] |= (distances <= reference_radii[columns]).any(1)
            references_inside[columns] |= (distances <= sample_radii[rows, None]).any(0)
    return PrecisionRecall(float(samples_inside.double().mean()), float(references_inside.double().mean()))


def radii(points: Tensor, k: int = 3, block: int = 4096) -> Tensor:
    """Squared distance from every point (N, D) to its k-th nearest other point: (N,).

    As published, it is the (k + 1)-th smallest of the distances to all points, the point itself included: a point
    that occurs twice has its twin at distance 0.
    """
    result = points.new_empty(len(points))
    for rows in _blocks(len(points), block):
        nearest = points.new_empty(rows.stop - rows.start, 0)
        for columns in _blocks(len(points), block):
            distances = squared_distances(points[rows], points[columns])
            if rows.start == columns.start:  # rounding must not move a point away from itself
                distances.fill_diagonal_(0)
            nearest = torch.cat([nearest, distances], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        result[rows] = nearest.max(1).values
    return result


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 for rows of a (n, D) and b (m, D): (n, m), never negative."""
    products = a @ b.T
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * products).clamp_(min=0)


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
