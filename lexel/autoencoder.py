"""The convolutional encoder and decoder around a quantizer.

Three designs. `vqgan` is the one of VQGAN (https://arxiv.org/abs/2012.09841) and IBQ (https://arxiv.org/abs/2412.02692):
residual blocks, attention at the deepest level. `magvit2` is Open-MAGVIT2's (https://arxiv.org/abs/2409.04410):
convolutions only, with a decoder that is told the statistics of the quantized latents. `simvq` is the same without
these statistics (https://arxiv.org/abs/2411.02038).
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError


class AutoencoderConfig(Config):
    """The size and design of the encoder and decoder.

    Level l has width * multipliers[l] channels and half the resolution of level l - 1, so that an image is downsampled
    by 2^(levels - 1), times `patch`. The defaults are those of the published IBQ tokenizers.
    """

    design: Literal["vqgan", "magvit2", "simvq"] = "vqgan"
    width: int = Field(default=128, ge=1)
    multipliers: list[int] = Field(default=[1, 1, 2, 2, 4], min_length=1)
    residual_blocks: int = Field(default=4, ge=1)  # in each level of the encoder; a vqgan decoder has one more
    attention_levels: list[int] = [4]  # levels with attention after every block
    middle_attention: bool = True  # attention between the two blocks in the middle
    z_channels: int = Field(default=256, ge=1)  # channels between encoder and decoder, before the projection to codes
    groups: int = Field(default=32, ge=1)  # of every group normalization; must divide every width
    patch: Literal[1, 2, 4, 8] = 1  # the image first becomes its Haar wavelets over squares of this side
    downsamplings: int | None = None  # how many levels halve the resolution; all but the last if not given

    @model_validator(mode="after")
    def _consistent(self) -> "AutoencoderConfig":
        for width in self.widths:
            if width < 1 or width % self.groups:
                raise ValueError(
                    f"{self.groups} groups do not divide the width {width} (width * multiplier); "
                    f"set groups to a divisor of it, such as {_divisor(width, self.groups)}"
                )
        levels = range(len(self.multipliers))
        if not set(self.attention_levels) <= set(levels):
            raise ValueError(f"attention_levels must be among {list(levels)}, got {self.attention_levels}")
        if self.downsamplings is not None and not 0 <= self.downsamplings < len(levels):
            raise ValueError(f"downsamplings must be in [0, {len(levels)}), got {self.downsamplings}")
        if self.design != "vqgan":
            if self.attention_levels or self.middle_attention:
                raise ValueError(
                    f"the {self.design} design has no attention; set attention_levels = [], middle_attention = false"
                )
            if self.patch != 1 or self.downsamplings is not None:
                raise ValueError(f"the {self.design} design has no patch and no downsamplings; leave them out")
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level, and of conv_in first."""
        return [self.width, *(self.width * multiplier for multiplier in self.multipliers)]

    @property
    def downsampling(self) -> int:
        """How many pixels of a side one latent stands for."""
        return self.patch * 2**self.halvings

    @property
    def halvings(self) -> int:
        """How many levels halve the resolution."""
        return len(self.multipliers) - 1 if self.downsamplings is None else self.downsamplings


def _divisor(width: int, at_most: int) -> int:
    return max(groups for groups in range(1, at_most + 1) if width % groups == 0) if width > 0 else 1


def build(config: AutoencoderConfig) -> tuple[nn.Module, nn.Module]:
    """The encoder, images (B, 3, H, W) to (B, z_channels, h, w), and the decoder, back."""
    encoder, decoder = DESIGNS[config.design]
    return encoder(config), decoder(config)


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, z_channels, H / f, W / f), f = config.downsampling; any multiple of f."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        self.wavelets = config.patch.bit_length() - 1  # how often the image becomes its wavelets, exactly and unlearned
        self.conv_in = conv3x3(3 * config.patch**2, config.width)
        self.levels = nn.ModuleList(
            Level(before, after, config.residual_blocks, groups, attention=number in config.attention_levels)
            for number, (before, after) in enumerate(pairwise(widths))
        )
        self.downsamples = nn.ModuleList(Downsample(width) for width in widths[1 : 1 + config.halvings])
        self.middle = Middle(widths[-1], groups, config.middle_attention)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = conv3x3(widths[-1], config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        for _ in range(self.wavelets):
            images = haar(images)
        x = self.conv_in(images)
        for number, level in enumerate(self.levels):
            x = level(x)
            if number < len(self.downsamples):
                x = self.downsamples[number](x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to images (B, 3, h f, w f), not clamped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = [*config.widths[1:], config.widths[-1]], config.groups
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.middle = Middle(widths[-1], groups, config.middle_attention)
        # Levels and upsamplings are numbered by resolution like the encoder's and run from the last to the first.
        self.levels = nn.ModuleList(
            Level(before, after, config.residual_blocks + 1, groups, attention=number in config.attention_levels)
            for number, (after, before) in enumerate(pairwise(widths))
        )
        self.first_upsampled = (
            len(config.multipliers) - config.halvings
        )  # levels from this one on double the resolution
        self.upsamples = nn.ModuleList(Upsample(width) for width in widths[self.first_upsampled : -1])
        self.norm_out = norm(widths[0], groups)
        self.conv_out = conv3x3(widths[0], 3 * config.patch**2)
        self.wavelets = config.patch.bit_length() - 1

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for number in reversed(range(len(self.levels))):
            x = self.levels[number](x)
            if number >= self.first_upsampled:
                x = self.upsamples[number - self.first_upsampled](x)
        images = self.conv_out(F.silu(self.norm_out(x)))
        for _ in range(self.wavelets):
            images = inverse_haar(images)
        return images


class MagvitEncoder(nn.Module):
    """The encoder of Open-MAGVIT2: like `Encoder`, with no attention and no biases in its blocks."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups, blocks = config.widths, config.groups, config.residual_blocks
        self.conv_in = conv3x3(3, config.width, bias=False)
        self.levels = nn.ModuleList(
            Level(before, after, blocks, groups, bias=False) for before, after in pairwise(widths)
        )
        self.downsamples = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths[1:-1])
        self.middle = Level(widths[-1], widths[-1], blocks, groups, bias=False)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for number, level in enumerate(self.levels):
            x = level(x)
            if number < len(self.downsamples):
                x = self.downsamples[number](x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class MagvitDecoder(nn.Module):
    """The decoder of Open-MAGVIT2: the statistics of the latents scale and shift the input of every level.

    The grid must have at least two positions, for the statistics hold an unbiased variance. SimVQ's decoder is the
    same without statistics.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups, blocks = [*config.widths[1:], config.widths[-1]], config.groups, config.residual_blocks
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.middle = Level(widths[-1], widths[-1], blocks, groups, bias=False)
        statistics = config.design == "magvit2"
        self.adaptive = nn.ModuleList(
            AdaptiveNorm(config.z_channels, before, groups) for before in widths[1:] if statistics
        )
        self.levels = nn.ModuleList(
            Level(before, after, blocks, groups, bias=False) for after, before in pairwise(widths)
        )
        self.upsamples = nn.ModuleList(DepthToSpace(width) for width in widths[1:-1])
        self.norm_out = norm(widths[0], groups)
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        if self.adaptive and z.shape[2] * z.shape[3] < 2:
            raise UsageError(f"the magvit2 decoder needs at least two latents an image, got a grid of {z.shape[2:]}")
        x = self.middle(self.conv_in(z))
        for number in reversed(range(len(self.levels))):
            x = self.levels[number](self.adaptive[number](x, z) if self.adaptive else x)
            if number > 0:
                x = self.upsamples[number - 1](x)
        return self.conv_out(F.silu(self.norm_out(x)))


DESIGNS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "vqgan": (Encoder, Decoder),
    "magvit2": (MagvitEncoder, MagvitDecoder),
    "simvq": (MagvitEncoder, MagvitDecoder),
}


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
        # (B, 1, h w, C): one head; the scale is 1 / sqrt(C)
        query, key, value = (
            project(y).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


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


class AdaptiveNorm(nn.Module):
    """Group normalization whose scale and shift follow from the deviation and mean of the latents' channels."""

    def __init__(self, z_channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6, affine=False)
        self.gamma = nn.Linear(z_channels, width)
        self.beta = nn.Linear(z_channels, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        positions = z.flatten(2)  # (B, z_channels, h w)
        scale = self.gamma((positions.var(2) + 1e-6).sqrt())  # the unbiased variance, as published
        shift = self.beta(positions.mean(2))
        return scale[..., None, None] * self.norm(x) + shift[..., None, None]


def haar(x: Tensor) -> Tensor:
    """One step of the Haar transform, as means: (B, C, H, W) to (B, 4 C, H / 2, W / 2).

    The order is mean, difference of rows, difference of columns, difference of diagonals, C channels each.
    """
    top, bottom = x[..., 0::2, :], x[..., 1::2, :]
    total, difference = top + bottom, top - bottom  # over the two rows
    bands = [
        total[..., 0::2] + total[..., 1::2],
        difference[..., 0::2] + difference[..., 1::2],
        total[..., 0::2] - total[..., 1::2],
        difference[..., 0::2] - difference[..., 1::2],
    ]
    return torch.cat(bands, 1) / 4


def inverse_haar(x: Tensor) -> Tensor:
    """The inverse of `haar`: (B, 4 C, H, W) to (B, C, 2 H, 2 W)."""
    mean, rows, columns, diagonals = x.chunk(4, 1)
    top_left, top_right = mean + rows + columns + diagonals, mean + rows - columns - diagonals
    bottom_left, bottom_right = mean - rows + columns - diagonals, mean - rows - columns + diagonals
    top = torch.stack([top_left, top_right], -1).flatten(-2)
    bottom = torch.stack([bottom_left, bottom_right], -1).flatten(-2)
    return torch.stack([top, bottom], -2).flatten(-3, -2)


def norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def conv3x3(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)
