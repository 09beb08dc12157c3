"""Index backpropagation as its formulas read: tensors of N x K, plain autograd. For tests and small sizes.

Double precision inputs give the reference that the fast implementations are held to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.distributed import mean_over_processes
from lexel.kernels.inputs import Inputs

EPS = 1e-5  # inside the logarithm of the batch entropy, as published


@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, distance: bool) -> Tensor:
    """The lowest index of the largest exact score in each row: int64 (N,)."""
    keys = keys.double()
    bias = -keys.square().sum(1) if distance else 0.0
    # One row at a time and no matrix product: equal codes get equal scores to the bit.
    return torch.stack([((query.double() * keys).sum(1) + bias).argmax() for query in queries])


def index_backpropagation(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z_q (N, D) with the gradient of all codes, the chosen codes, indices, and both entropies."""
    queries, keys = inputs.queries, inputs.keys
    codes = keys if inputs.codes is None else inputs.codes
    indices = nearest(queries, keys, inputs.distance)
    logits = queries @ keys.T
    if inputs.distance:
        logits = logits - keys.square().sum(1)
    p = (logits / inputs.temperature).softmax(1)
    hard = F.one_hot(indices, len(keys)).to(p.dtype)
    z_q = (hard + (p - p.detach())) @ codes
    log_q = (logits / inputs.entropy_temperature).log_softmax(1)
    q = log_q.exp()
    means = [mean_over_processes(part.mean(0), len(part), inputs.together) for part in q.chunk(inputs.parts)]
    batch = torch.stack([-(mean * (mean + EPS).log()).sum() for mean in means]).mean()
    return z_q, codes[indices], indices, -(q * log_q).sum(1).mean(), batch
