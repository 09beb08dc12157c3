"""EfficientNet-Lite0, an ImageNet classifier that a Python package carries, under the tensor names of that package.

EfficientNet (https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with rectifiers clipped at 6.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from lexel.networks import weights as pretrained
from lexel.networks.features import FeatureNetwork

STAGES = (  # repeats, kernel size, stride of the first, expansion, width
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(FeatureNetwork):
    """An ImageNet classifier for Fréchet distances and class scores without a download: 1,280 features, 1,000 logits.

    Its numbers are not FID or inception scores and carry its name.
    """

    name = "efficientnet_lite0"
    side = 224
    dims = 1280
    classes = 1000
    classifier = "_fc"

    @classmethod
    def load(cls, weights: str | Path | None = None) -> Mapping[str, Tensor]:
        return pretrained.load("efficientnet_lite0", weights)

    @classmethod
    def _network(cls) -> nn.Module:
        return _Layers(cls.classes)

    def _normalise(self, images: Tensor) -> Tensor:
        return ((images + 1) * 127.5 - 127) / 128


class _Layers(nn.Module):
    """The layers under their published names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        blocks = []
        channels = 32
        for repeats, size, stride, expansion, width in STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, width, size, stride if number == 0 else 1, expansion))
                channels = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, 1280, 1)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, classes)  # applied by `EfficientNetLite0`

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Pooled features (B, 1280) of normalised images (B, 3, 224, 224)."""
        images = F.relu6(self._bn0(self._conv_stem(images)))  # (B, 32, 112, 112)
        for block in self._blocks:
            images = block(images)
        images = F.relu6(self._bn1(self._conv_head(images)))  # (B, 1280, 7, 7)
        return images.mean((2, 3)), None


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
