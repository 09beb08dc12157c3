"""Frozen networks: constants of a loss or a metric, not parts of a model; and the precision that metrics need."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Turns every parameter and buffer of `module` into a buffer that is not saved, and puts it in eval mode.

    What remains follows `.to()`, is found by no optimizer, is counted with no model's parameters, is copied into no
    checkpoint and is not synchronised by DistributedDataParallel's gradient buckets. Works in place.
    """
    for part in module.modules():
        tensors = {name: p.detach() for name, p in part.named_parameters(recurse=False)}
        tensors |= dict(part.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            delattr(part, name)
            part.register_buffer(name, tensor, persistent=False)
    return module.eval()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """True float32 for what runs inside: no autocast, and no TF32, which CUDA's convolutions otherwise use."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before
