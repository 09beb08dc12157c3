"""Statistics over all processes. Whether there are several is asked at every call, never remembered."""

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes train together; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_sum(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place; no gradient."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def all_rows(rows: Tensor) -> Tensor:
    """The rows (N, D) of every process, in the order of their ranks; each process must give equally many."""
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of `values` over all processes; the gradient is that of the local values.

    Data-parallel training averages gradients over processes, which makes it the gradient of the global mean.
    """
    if processes() == 1:
        return values
    mean = all_sum(values.detach().clone()) / processes()
    return mean + (values - values.detach())
