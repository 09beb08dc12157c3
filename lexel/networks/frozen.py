"""Frozen networks: constants of a loss or a metric, not parts of a model."""

from typing import TypeVar

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
