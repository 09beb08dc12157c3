"""Losses are sums over many terms: half precision is not enough for them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products inside have the precision of their factors, whatever the device of `tensor`."""
    if tensor.is_meta:  # has no autocast
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
