"""Guidance of a flow: plain, or projected so that strong guidance does not oversaturate."""

import torch
from torch import Tensor


class ProjectedGuidance:
    """Adaptive projected guidance (https://arxiv.org/abs/2410.02416), with the values of the released FlexTok.

    The difference that guides is averaged over steps (with a negative momentum), its length is capped, and its part
    along the conditional prediction is taken out. Every image is treated for itself. An instance belongs to one path.

    Args:
        momentum: share of the difference before that is added.
        longest: what the length of an image's difference is capped at; 0 caps nothing.
        along: share that is kept of the part along the conditional prediction.
    """

    def __init__(self, momentum: float = -0.5, longest: float = 2.5, along: float = 0.0) -> None:
        self.momentum, self.longest, self.along = momentum, longest, along
        self.before: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The guided prediction (B, C, ...); a scale of 1 is the conditional one."""
        difference = conditional - unconditional
        if self.before is not None:
            difference = difference + self.momentum * self.before
        self.before = difference
        if self.longest > 0:
            difference = difference * (self.longest / _length(difference)).clamp(max=1)
        direction = conditional / _length(conditional).clamp_min(1e-12)
        parallel = (difference * direction).flatten(1).sum(1).view(-1, *[1] * (direction.dim() - 1)) * direction
        return conditional + (scale - 1) * (difference - (1 - self.along) * parallel)


def _length(x: Tensor) -> Tensor:
    """The norm of each image (B, ...), to be divided by: (B, 1, ...)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.dim() - 1))
