"""Frozen networks: constants of a loss or a metric, not parts of a model; and the images that they expect."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from lexel.runtime import without_weights

Module = TypeVar("Module", bound=nn.Module)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of channels in [0, 1]


class Constant(nn.Module):
    """A module that is always in eval mode, whatever the model that it stands in does."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)


class Standardise(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] in the range that a network was trained on.

    Args:
        mean, deviation: of its channels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.deviation = nn.Buffer(torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images.to(self.mean.dtype) + 1) / 2 - self.mean) / self.deviation


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
