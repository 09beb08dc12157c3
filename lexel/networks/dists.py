"""DISTS: similarity of structure and texture in VGG16's features (https://arxiv.org/abs/2004.07728)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexel.errors import UsageError
from lexel.networks import weights as pretrained
from lexel.networks.frozen import IMAGENET, Constant, Standardise, frozen_with
from lexel.networks.vgg16 import VGG16
from lexel.runtime import on_meta

WIDTHS = (3, *VGG16.TAP_WIDTHS)  # the image itself is the first of six feature maps
EPSILON = 1e-6  # of both quotients


class DISTS(Constant):
    """One minus the weighted similarity of means (texture) and covariances (structure) of six feature maps.

    VGG16's poolings by maximum are replaced by weighted root mean squares of 3 x 3 windows. It is a constant: always in
    eval mode, without parameters; gradients reach the images. Made inside `without_weights` it has shapes only.

    Raises:
        UsageError: the weights of VGG16 or of the channels are not found.
    """

    SMALLEST_SIDE = 16  # four poolings leave one position

    def __init__(self) -> None:
        super().__init__()
        meta = on_meta()
        self.trunk = frozen_with(VGG16, None if meta else pretrained.load_vgg16())
        shapes = {name: torch.empty(sum(WIDTHS)) for name in ("alpha", "beta")}
        channels = shapes if meta else pretrained.load("dists")
        total = channels["alpha"].sum() + channels["beta"].sum()
        self.alpha = nn.Buffer(channels["alpha"].flatten() / total, persistent=False)  # (1475,)
        self.beta = nn.Buffer(channels["beta"].flatten() / total, persistent=False)
        self.standardise = Standardise(*IMAGENET)
        line = torch.tensor([0.5, 1.0, 0.5])  # a Hann window of 5 without its zeros
        self.window = nn.Buffer(torch.outer(line, line) / line.sum() ** 2, persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair: (B,) for images a and b, both (B, 3, H, W) in [-1, 1]; 0 for equal images.

        Raises:
            UsageError: the shapes differ, are not (B, 3, H, W), or are too small.
        """
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or min(a.shape[2:]) < self.SMALLEST_SIDE:
            raise UsageError(
                f"DISTS compares images (B, 3, H, W) of equal shape with sides of at least {self.SMALLEST_SIDE}, got"
                f" {tuple(a.shape)} and {tuple(b.shape)}"
            )
        similarity = torch.zeros(len(a), device=a.device)
        weights = zip(self.alpha.split(WIDTHS), self.beta.split(WIDTHS), strict=True)
        for of_a, of_b, (alpha, beta) in zip(self._features(a), self._features(b), weights, strict=True):
            mean_a, mean_b = of_a.mean((2, 3)), of_b.mean((2, 3))  # (B, C)
            variance_a, variance_b = of_a.var((2, 3), correction=0), of_b.var((2, 3), correction=0)
            covariance = (of_a * of_b).mean((2, 3)) - mean_a * mean_b
            texture = (2 * mean_a * mean_b + EPSILON) / (mean_a.square() + mean_b.square() + EPSILON)
            structure = (2 * covariance + EPSILON) / (variance_a + variance_b + EPSILON)
            similarity = similarity + (alpha * texture + beta * structure).sum(1)
        return 1 - similarity

    def _features(self, images: Tensor) -> list[Tensor]:
        outputs, x = [(images.to(self.window.dtype) + 1) / 2], self.standardise(images)
        for number, layer in enumerate(self.trunk.features):
            x = self._pooled(x) if isinstance(layer, nn.MaxPool2d) else layer(x)
            if number in self.trunk.taps:
                outputs.append(x)
        return outputs

    def _pooled(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.window.expand(channels, 1, 3, 3)
        return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=channels) + 1e-12).sqrt()
