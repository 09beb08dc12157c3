"""Reconstruction losses: l1, l2, and distances in the features of frozen networks."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lexel.losses.base import Loss, LossInputs
from lexel.losses.perceptual import LPIPS
from lexel.networks.dists import DISTS
from lexel.runtime import at_least_float32


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over every value of two tensors of equal shape: a scalar."""
    return F.l1_loss(at_least_float32(a), at_least_float32(b))


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over every value of two tensors of equal shape: a scalar."""
    return F.mse_loss(at_least_float32(a), at_least_float32(b))


class L1Loss(Loss):
    """Mean absolute difference of pixels."""

    def forward(self, inputs: LossInputs) -> Tensor:
        return l1(inputs.reconstructions, inputs.images)


class L2Loss(Loss):
    """Mean squared difference of pixels."""

    def forward(self, inputs: LossInputs) -> Tensor:
        return l2(inputs.reconstructions, inputs.images)


class LPIPSLoss(Loss):
    """LPIPS: learned perceptual distance in the features of VGG16 or AlexNet (https://arxiv.org/abs/1801.03924).

    Args:
        network: "vgg", as published tokenizers, or "alex".

    Raises:
        UsageError: the weights are not found.
    """

    colour = True

    def __init__(self, network: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        self.distance = LPIPS(network)

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.distance(inputs.reconstructions, inputs.images).mean()


class DISTSLoss(Loss):
    """DISTS: similarity of structure and texture in VGG16's features (https://arxiv.org/abs/2004.07728).

    It is the distance that the metric `dists` reports, on images that are not rounded.

    Raises:
        UsageError: the weights are not found.
    """

    colour = True

    def __init__(self) -> None:
        super().__init__()
        self.distance = DISTS()

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.distance(inputs.reconstructions, inputs.images).mean()
