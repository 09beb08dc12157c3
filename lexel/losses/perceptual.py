"""LPIPS: distance between images in the features of a classifier (https://arxiv.org/abs/1801.03924), version 0.1."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.networks import weights as pretrained
from lexel.networks.alexnet import AlexNet
from lexel.networks.frozen import Constant, frozen_with
from lexel.networks.vgg16 import VGG16
from lexel.registry import lookup
from lexel.runtime import at_least_float32, on_meta

NETWORKS: dict[str, type[VGG16] | type[AlexNet]] = {"vgg": VGG16, "alex": AlexNet}


class LPIPS(Constant):
    """The learned perceptual distance of pairs of images.

    It is a constant: always in eval mode, without parameters, and its weights are saved with no model. Gradients reach
    the images. Numbers of the two networks are not comparable; published tokenizers are trained with "vgg".

    Args:
        network: the classifier, "vgg" (VGG16) or "alex" (AlexNet).
        weights: a weights file to use instead of the cached one or the installed package's.

    Raises:
        UsageError: the network is unknown or its weights are not found.
    """

    def __init__(self, network: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        self.network, trunk = network, lookup(NETWORKS, network, "LPIPS network")
        tensors = None if on_meta() else pretrained.load(f"lpips_{network}", weights)
        heads = [
            torch.empty(width) if tensors is None else tensors.pop(f"heads.{number}")
            for number, width in enumerate(trunk.TAP_WIDTHS)
        ]
        self.trunk = cast("VGG16 | AlexNet", frozen_with(trunk, tensors))
        for number, head in enumerate(heads):
            self.register_buffer(f"head_{number}", head.flatten(), persistent=False)  # (C,)
        # To the mean and the deviation of ImageNet's channels, for images in [-1, 1].
        self.shift = nn.Buffer(torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.scale = nn.Buffer(torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair: (B,) for images a and b, both (B, 3, H, W) in [-1, 1]; 0 for equal images.

        Raises:
            UsageError: the shapes differ, are not (B, 3, H, W), or are too small for the network.
        """
        smallest = self.trunk.SMALLEST_SIDE
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or min(a.shape[2:]) < smallest:
            raise UsageError(
                f"LPIPS ({self.network}) compares images (B, 3, H, W) of equal shape with sides of at least {smallest},"
                f" got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        total = torch.zeros((), device=a.device)
        for number, (of_a, of_b) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            head = self.get_buffer(f"head_{number}")
            squares = (_unit(of_a) - _unit(of_b)).square()  # (B, C, h, w)
            # The published 1x1 convolution followed by a mean over space, in the cheaper order.
            total = total + (squares.mean((2, 3)) * head).sum(1)
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        return self.trunk((images.to(self.shift.dtype) - self.shift) / self.scale)


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) over their length at each position (plus 1e-10, as published)."""
    features = at_least_float32(features)
    squares = features.square().sum(1, keepdim=True)
    # The root has no slope at 0, and one dead position would turn every gradient into NaN. Such features are all zero,
    # so any length gives the published value.
    length = torch.where(squares > 0, squares, 1).sqrt()
    return features / (length + 1e-10)
