"""LeCAM: keeps a discriminator from running ahead when data are few (https://arxiv.org/abs/2104.03310)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexel.distributed import all_sum
from lexel.runtime import at_least_float32


class LeCAM(nn.Module):
    """Holds the logits of real images near the running mean of generated ones, and the other way round.

    The two running means are buffers: they are saved with checkpoints, equal in all processes, and move in training
    mode only, so validation does not touch them. They start at 0, without bias correction, as published. (In the
    published code they are plain numbers that are lost on resume, differ between processes and follow validation.)

    Args:
        decay: of the running means, in [0, 1); the part of the old mean that is kept at each step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.real_mean = nn.Buffer(torch.zeros(()))
        self.fake_mean = nn.Buffer(torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean squared excess of real logits over the mean fake one, and of the mean real one over fake logits.

        In training mode the means take in this batch first, that of all processes together: every process must call.

        Args:
            real: the discriminator's logits of real images, any shape.
            fake: its logits of generated images, any shape.
        """
        real, fake = at_least_float32(real), at_least_float32(fake)
        if self.training:
            real_now, fake_now = _means(real.detach(), fake.detach())
            self.real_mean.lerp_(real_now.to(self.real_mean), 1 - self.decay)
            self.fake_mean.lerp_(fake_now.to(self.fake_mean), 1 - self.decay)
        return F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()


def _means(real: Tensor, fake: Tensor) -> Tensor:
    """The means of two sets of logits over all processes, which may hold different numbers of them: (2,)."""
    sums = torch.stack([real.sum(), fake.sum()])
    counts = torch.stack([sums.new_full((), real.numel()), sums.new_full((), fake.numel())])  # waits for no device
    sums, counts = all_sum(torch.stack([sums, counts]))
    return sums / counts
