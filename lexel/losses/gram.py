"""Gram loss: how two images differ in which features of a frozen network appear together (their texture)."""

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.losses.base import Loss, LossInputs
from lexel.networks.backbones import backbone, check_size
from lexel.runtime import at_least_float32, without_autocast


class GramLoss(Loss):
    """Mean absolute difference of Gram matrices (https://arxiv.org/abs/1508.06576), as in Cosmos' tokenizers.

    The Gram matrix of a map F (C, h, w) is F F^T / (C h w), a (C, C) matrix for each image; the loss is the mean of
    |G(reconstruction) - G(image)| over its entries and over the levels (https://arxiv.org/abs/2501.03575).

    Args:
        network: a backbone: vgg16, efficientnet_lite0, a folder or hub id of transformers.
        levels: numbers of its maps, from 0; all of them if not given.
        size: pixels a side of the images that the network sees; by default as they are.

    Raises:
        UsageError: the network or a level does not exist, or its weights are not here.
    """

    colour = True

    def __init__(self, network: str = "vgg16", levels: list[int] | None = None, size: int | None = None) -> None:
        super().__init__()
        self.network = backbone(network)
        depth = len(self.network.widths)
        self.levels = list(range(depth)) if levels is None else levels
        if not self.levels or not all(0 <= level < depth for level in self.levels):
            raise UsageError(f"levels of {network} are numbers in [0, {depth}), got {self.levels}")
        check_size(size)
        self.size = size

    def forward(self, inputs: LossInputs) -> Tensor:
        with torch.no_grad():
            wanted = self._grams(inputs.images)
        made = self._grams(inputs.reconstructions)
        return torch.stack([(a - b).abs().mean() for a, b in zip(made, wanted, strict=True)]).mean()

    def _grams(self, images: Tensor) -> list[Tensor]:
        maps = self.network.at(images, self.size)
        return [gram(maps[level]) for level in self.levels]


def gram(features: Tensor) -> Tensor:
    """F F^T / (C h w) of maps (B, C, h, w): (B, C, C), at least float32."""
    rows = at_least_float32(features).flatten(2)
    with without_autocast(rows.device):
        return rows @ rows.transpose(1, 2) / (rows.shape[1] * rows.shape[2])
