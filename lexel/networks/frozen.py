"""Frozen networks: constants of a loss or a metric, not parts of a model."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from lexel.runtime import without_weights

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


def frozen_with(network: Callable[[], Module], tensors: Mapping[str, Tensor] | None) -> Module:
    """A frozen network with these tensors, which must be all of its; without them (None), with shapes only."""
    with without_weights():  # every tensor comes from outside: nothing is drawn, no random state is touched
        made = network()
    if tensors is not None:
        made.load_state_dict(dict(tensors), strict=True, assign=True)
    return freeze(made)
