"""Index backpropagation as its formulas read: tensors of N x K, plain autograd. For tests and small sizes.

Double precision inputs give the reference that the fast implementations are held to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.kernels.problem import Problem

EPS = 1e-5  # inside the logarithm of the batch entropy, as published


@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, distance: bool) -> Tensor:
    """The lowest index of the largest exact score in each row: int64 (N,)."""
    keys = keys.double()
    bias = -keys.square().sum(1) if distance else 0.0
    # One row at a time and no matrix product: equal codes get equal scores to the bit.
    return torch.stack([((query.double() * keys).sum(1) + bias).argmax() for query in queries])


def index_backpropagation(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z_q (N, D) with the gradient of all codes, the chosen codes, indices, and both entropies."""
    queries, keys = problem.queries, problem.keys
    codes = keys if problem.codes is None else problem.codes
    indices = nearest(queries, keys, problem.distance)
    logits = queries @ keys.T
    if problem.distance:
        logits = logits - keys.square().sum(1)
    p = (logits / problem.temperature).softmax(1)
    hard = F.one_hot(indices, len(keys)).to(p.dtype)
    z_q = (hard + (p - p.detach())) @ codes
    log_q = (logits / problem.entropy_temperature).log_softmax(1)
    q = log_q.exp()
    mean = q.mean(0)
    return z_q, codes[indices], indices, -(q * log_q).sum(1).mean(), -(mean * (mean + EPS).log()).sum()
