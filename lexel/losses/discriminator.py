"""Discriminators that judge an image patch by patch, on pixels or on the features of a frozen network."""

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from lexel.errors import UsageError
from lexel.networks.backbones import backbone, check_size


class PatchDiscriminator(nn.Module):
    """PatchGAN (https://arxiv.org/abs/1611.07004): each logit judges one patch (70x70 pixels with three layers).

    4x4 convolutions: `layers` of stride 2 that double the width up to eight times, then one more of stride 1, then one
    to a single channel. With the default arguments, 2,765,633 parameters and (B, 1, 30, 30) logits for 256x256 images,
    tensor for tensor the discriminator of the published tokenizers. Small images want fewer layers: 2 at 64 pixels,
    1 at 32.

    Args:
        layers: convolutions of stride 2, at least 1.
        width: channels after the first convolution.
    """

    batch_norm: ClassVar[bool] = True

    def __init__(self, layers: int = 3, width: int = 64) -> None:
        super().__init__()
        if layers < 1 or width < 1:
            raise UsageError(f"a discriminator needs layers and width of at least 1, got {layers} and {width}")
        self.layers = layers
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for number in range(1, layers + 1):
            wider = width * min(2**number, 8)
            parts += [
                nn.Conv2d(channels, wider, 4, stride=2 if number < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        parts.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        for part in self.main:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)
                nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w), high for patches taken for real, for images (B, 3, H, W) in [-1, 1].

        Raises:
            UsageError: a side of the images is smaller than 3 * 2^layers, which leaves no patch.
        """
        smallest = 3 * 2**self.layers
        if min(images.shape[-2:]) < smallest:
            raise UsageError(
                f"a discriminator of {self.layers} layers needs images of at least {smallest}x{smallest} pixels, "
                f"got {images.shape[-2]}x{images.shape[-1]}; give it fewer layers"
            )
        return self.main(images)


class BlurDiscriminator(nn.Module):
    """The discriminator of the published pretrained tokenizers and of MaskBit (https://arxiv.org/abs/2409.16211).

    Normalises each image by itself (GroupNorm), so it does not depend on the batch, and halves the grid by a blur
    instead of a strided convolution. With the default arguments, 1,909,889 parameters and (B, 1, 32, 32) logits for
    256x256 images.

    Args:
        layers: halvings of the grid, at least 1; the first keeps the width, each other doubles it.
        width: channels after the first convolution, a multiple of 32.
        taps: length of the blur's binomial filter, 3 to 5; 4 as published.
    """

    batch_norm: ClassVar[bool] = False

    def __init__(self, layers: int = 3, width: int = 128, taps: int = 4) -> None:
        super().__init__()
        if not 3 <= taps <= 5:
            raise UsageError(f"a blur discriminator needs a filter of 3, 4 or 5 taps, got {taps}")
        if layers < 1 or width < 1 or width % 32:
            raise UsageError(
                f"a blur discriminator needs at least 1 layer and a width that is a multiple of 32, "
                f"got {layers} and {width}"
            )
        self.stem = nn.Conv2d(3, width, 5, padding=2)
        widths = [width, *(width * 2**number for number in range(layers))]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(32, wide) for wide in widths[1:])
        self.head = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )
        row = torch.tensor([math.comb(taps - 1, tap) for tap in range(taps)]) / 2 ** (taps - 1)
        self.blur = nn.Buffer(torch.outer(row, row), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w), high for patches taken for real, for images (B, 3, H, W) in [-1, 1]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The head's input features: (B, channels, h, w)."""
        images = F.leaky_relu(self.stem(images), 0.1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = F.leaky_relu(norm(self._halve(convolution(images))), 0.1)
        return images

    def _halve(self, images: Tensor) -> Tensor:
        """Each channel blurred at every other position; (H, W) becomes (H / 2, W / 2), rounded up for 4 taps."""
        channels, height, width = images.shape[1:]
        images = F.pad(images, (1, 1 + width % 2, 1, 1 + height % 2))  # of 4 taps, whatever their number, as published
        return F.conv2d(images, self.blur.expand(channels, 1, *self.blur.shape), stride=2, groups=channels)


class PooledBlurDiscriminator(BlurDiscriminator):
    """The discriminator of TiTok's second stage (https://arxiv.org/abs/2406.07550): the same, on a grid of 16 x 16.

    The largest features of each part of the grid go on; logits are (B, 1, 16, 16) for images of any size.
    """

    def features(self, images: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(super().features(images), 16)


class FeatureDiscriminator(nn.Module):
    """Heads on the maps of a frozen network, as in StyleGAN-T and GigaTok (arXiv 2301.09515, 2504.08736).

    Every map of the backbone has a head of its own: a 1x1 and a 3x3 convolution to `width` channels, the latter
    residual, then one to a single channel; convolutions have spectral normalization, features are normalised by groups
    within each image, so that logits do not depend on the batch (the published heads normalise over parts of a batch,
    and convolve over sequences of tokens). Only the heads learn and are saved.

    Args:
        network: a backbone: efficientnet_lite0, vgg16, or a vision transformer of transformers by path or hub id.
        width: channels of each head, a multiple of 8.
        size: pixels a side of the images that the backbone sees; by default what they have.

    Raises:
        UsageError: the backbone or its weights are not here, or the width cannot be used.
    """

    batch_norm: ClassVar[bool] = False

    def __init__(self, network: str = "efficientnet_lite0", width: int = 64, size: int | None = None) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise UsageError(f"a feature discriminator needs a width that is a multiple of 8, got {width}")
        check_size(size)
        self.size = size
        self.network = backbone(network)
        self.heads = nn.ModuleList(_Head(channels, width) for channels in self.network.widths)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, n) of every place of every map, high where taken for real, for images (B, 3, H, W) in [-1, 1]."""
        maps = self.network.at(images, self.size)
        return torch.cat([head(each).flatten(1) for head, each in zip(self.heads, maps, strict=True)], 1)


class _Head(nn.Module):
    """A map (B, channels, h, w) to logits (B, 1, h, w)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(channels, width, 1))
        self.second = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.last = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norms[0](self.first(x)), 0.2)
        x = (x + F.leaky_relu(self.norms[1](self.second(x)), 0.2)) / 2**0.5
        return self.last(x)


DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "patch": PatchDiscriminator,
    "blur": BlurDiscriminator,
    "blur_pooled": PooledBlurDiscriminator,
    "features": FeatureDiscriminator,
}
GROUP = "lexel.discriminators"  # the entry points by which other packages add theirs
