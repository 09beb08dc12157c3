"""The Inception V3 behind FID and the inception score (https://arxiv.org/abs/1512.00567), as TensorFlow runs it.

The weights are TensorFlow's graph of 2015-12-05 with its 1,008 classes, in the file of the pytorch-fid port
(pt_inception-2015-12-05-6726825d.pth), whose tensor names the layers below keep. That graph differs from the paper's
network: averages leave padding out, and the last block pools by maximum.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexel.networks.features import FeatureNetwork


class Inception(FeatureNetwork):
    """FID's network: 2,048 pooled features, 1,008 logits, and sFID's map of 17 x 17 x 7 = 2,023 values.

    The resize rule decides how grey levels are centred too, as in the code that each rule comes from: "tf1" (the
    evaluator of guided diffusion) and "clean" (clean-fid) use (level - 128) / 128, "half_pixel" (pytorch-fid) uses
    level / 127.5 - 1. Logits leave the classifier's bias out unless asked, as the published inception scores do.
    """

    name = "inception"
    side = 299
    dims = 2048
    classes = 1008
    spatial_dims = 2023
    resize_rule = "tf1"
    logit_bias = False
    classifier = "fc"

    @classmethod
    def _network(cls) -> nn.Module:
        return InceptionV3(cls.classes)

    def _normalise(self, images: Tensor) -> Tensor:
        if self.resize_rule == "half_pixel":
            return images
        return ((images + 1) * 127.5 - 128) / 128


class InceptionV3(nn.Module):
    """The layers under their published names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = BlockA(192, pooled_width=32)
        self.Mixed_5c = BlockA(256, pooled_width=64)
        self.Mixed_5d = BlockA(288, pooled_width=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pool=_mean_of_3x3)
        self.Mixed_7c = BlockE(2048, pool=_maximum_of_3x3)
        self.fc = nn.Linear(2048, classes)  # applied by `Inception`, with or without its bias

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, 2048) and sFID's map (B, 2023) of normalised images (B, 3, 299, 299)."""
        images = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        images = F.max_pool2d(images, 3, stride=2)  # (B, 64, 73, 73)
        images = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(images))
        images = F.max_pool2d(images, 3, stride=2)  # (B, 192, 35, 35)
        images = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(images)))  # (B, 288, 35, 35)
        images = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(images))))  # (B, 768, 17, 17)
        # sFID: seven channels of this block's 1x1 branch (mixed_6/conv in TensorFlow), which comes first in the
        # concatenation; flattened as TensorFlow lays images out, or published statistics would not fit.
        spatial = images[:, :7].permute(0, 2, 3, 1).flatten(1)
        images = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(images))))  # (B, 2048, 8, 8)
        return images.mean((2, 3)), spatial


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, rectifier."""

    def __init__(
        self,
        channels: int,
        width: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _mean_of_3x3(x: Tensor) -> Tensor:
    """As TensorFlow averages: positions outside of the image do not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum_of_3x3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _row(channels: int, width: int) -> ConvNorm:
    return ConvNorm(channels, width, (1, 7), padding=(0, 3))


def _column(channels: int, width: int) -> ConvNorm:
    return ConvNorm(channels, width, (7, 1), padding=(3, 0))


class BlockA(nn.Module):
    """1x1, 5x5, twice 3x3, and pooling, side by side."""

    def __init__(self, channels: int, pooled_width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 64, 1)
        self.branch5x5_1 = ConvNorm(channels, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(channels, pooled_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        of_5x5 = self.branch5x5_2(self.branch5x5_1(x))
        of_3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), of_5x5, of_3x3, self.branch_pool(_mean_of_3x3(x))], 1)


class BlockB(nn.Module):
    """Halves the grid: 3x3, twice 3x3, and pooling, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        of_3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), of_3x3, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """1x1, 7x7 as a row and a column, twice 7x7, and pooling, side by side."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 192, 1)
        self.branch7x7_1 = ConvNorm(channels, width, 1)
        self.branch7x7_2 = _row(width, width)
        self.branch7x7_3 = _column(width, 192)
        self.branch7x7dbl_1 = ConvNorm(channels, width, 1)
        self.branch7x7dbl_2 = _column(width, width)
        self.branch7x7dbl_3 = _row(width, width)
        self.branch7x7dbl_4 = _column(width, width)
        self.branch7x7dbl_5 = _row(width, 192)
        self.branch_pool = ConvNorm(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean_of_3x3(x))], 1)


class BlockD(nn.Module):
    """Halves the grid: 3x3, 7x7 then 3x3, and pooling, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(channels, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(channels, 192, 1)
        self.branch7x7x3_2 = _row(192, 192)
        self.branch7x7x3_3 = _column(192, 192)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        of_3x3 = self.branch3x3_2(self.branch3x3_1(x))
        of_7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([of_3x3, of_7x7, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """1x1, 3x3 as a row beside a column, 3x3 then the same, and pooling, side by side."""

    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNorm(channels, 320, 1)
        self.branch3x3_1 = ConvNorm(channels, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(channels, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(once),
                self.branch3x3_2b(once),
                self.branch3x3dbl_3a(twice),
                self.branch3x3dbl_3b(twice),
                self.branch_pool(self.pool(x)),
            ],
            1,
        )
