"""Parts of convolutional autoencoders: options, residual blocks, attention, resampling."""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.autoencoders.base import Autoencoder, AutoencoderConfig


class ConvolutionalConfig(AutoencoderConfig):
    """The size of a convolutional encoder and decoder.

    Level l has width * multipliers[l] channels and half the resolution of level l - 1, so that an image is downsampled
    by 2^(levels - 1). The defaults are those of the published IBQ tokenizers.
    """

    width: int = Field(default=128, ge=1)
    multipliers: list[int] = Field(default=[1, 1, 2, 2, 4], min_length=1)
    residual_blocks: int = Field(default=4, ge=1)  # in each level of the encoder
    z_channels: int = Field(default=256, ge=1)  # channels between encoder and decoder, before the projection to codes
    groups: int = Field(default=32, ge=1)  # of every group normalization; must divide every width

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> "ConvolutionalConfig":
        for width in self.widths:
            if width < 1 or width % self.groups:
                raise ValueError(
                    f"{self.groups} groups do not divide the width {width} (width * multiplier); "
                    f"set groups to a divisor of it, such as {_divisor(width, self.groups)}"
                )
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level, and of conv_in first."""
        return [self.width, *(self.width * multiplier for multiplier in self.multipliers)]

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one latent."""
        return 2 ** (len(self.multipliers) - 1)

    def identity(self) -> dict[str, Any]:
        """The table under which versions before 0.2 took fingerprints: one for the three first designs."""
        table = super().identity()
        absent = {"attention_levels": [], "middle_attention": False, "patch": 1, "downsamplings": None}
        return absent | {"design" if name == "kind" else name: value for name, value in table.items()}


def _divisor(width: int, at_most: int) -> int:
    return max(groups for groups in range(1, at_most + 1) if width % groups == 0) if width > 0 else 1


class Convolutional(Autoencoder):
    """An autoencoder whose grid is the image, divided."""

    config: ConvolutionalConfig

    @property
    def downsampling(self) -> int:
        return self.config.downsampling


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(
        self, before: int, after: int, blocks: int, groups: int, *, attention: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        widths = [before] + [after] * blocks
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups, bias) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(Attention(after, groups) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return x


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block1 = ResidualBlock(width, width, groups)
        self.attention = Attention(width, groups) if attention else nn.Identity()
        self.block2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class ResidualBlock(nn.Module):
    """Twice normalization, swish and a 3x3 convolution, added to the input (projected if the width changes)."""

    def __init__(self, before: int, after: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = norm(before, groups)
        self.conv1 = conv3x3(before, after, bias)
        self.norm2 = norm(after, groups)
        self.conv2 = conv3x3(after, after, bias)
        self.shortcut = nn.Conv2d(before, after, 1, bias=bias) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


class Attention(nn.Module):
    """Self-attention over all positions of the grid, one head as wide as the channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # (B, 1, h w, C): one head; the scale is 1 / sqrt(C). Fused kernels, which keep no (h w, h w) matrix, want
        # channels that lie side by side.
        query, key, value = (
            project(y).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Conv2d):
    """Halves the resolution: a 3x3 convolution of stride 2, with zeros at the right and the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the resolution: every pixel four times, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DepthToSpace(nn.Conv2d):
    """Doubles the resolution: a 3x3 convolution makes four pixels of each, in the order (row, column, channel)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        pixels = super().forward(x).reshape(batch, 2, 2, width, height, breadth)
        return pixels.permute(0, 3, 4, 1, 5, 2).reshape(batch, width, 2 * height, 2 * breadth)


def norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def conv3x3(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)
