"""The autoencoder of VQGAN (https://arxiv.org/abs/2012.09841) and IBQ (https://arxiv.org/abs/2412.02692).

Residual blocks at every level, attention at the deepest.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.autoencoders.convolutional import (
    Convolutional,
    ConvolutionalConfig,
    Downsample,
    Level,
    Middle,
    Upsample,
    conv3x3,
    norm,
)
from lexel.errors import UsageError


class VQGANConfig(ConvolutionalConfig):
    """The size of VQGAN's encoder and decoder; an image is downsampled by 2^(levels - 1), times `patch`."""

    LATER = {**ConvolutionalConfig.LATER, "projection_kernel": 1, "fold": 1}

    kind: Literal["vqgan"] = "vqgan"
    attention_levels: list[int] = [4]  # levels with attention after every block
    middle_attention: bool = True  # attention between the two blocks in the middle
    patch: Literal[1, 2, 4, 8] = 1  # the image first becomes its Haar wavelets over squares of this side
    projection_kernel: Literal[1, 3] = 1  # side of the convolutions between latents and codes
    fold: int = Field(default=1, ge=1, le=16)  # side of a square of latents that one code describes (RQ-VAE)
    downsamplings: int | None = None  # how many levels halve the resolution; all but the last if not given

    @model_validator(mode="after")
    def _consistent(self) -> "VQGANConfig":
        levels = range(len(self.multipliers))
        if not set(self.attention_levels) <= set(levels):
            raise ValueError(f"attention_levels must be among {list(levels)}, got {self.attention_levels}")
        if self.downsamplings is not None and not 0 <= self.downsamplings < len(levels):
            raise ValueError(f"downsamplings must be in [0, {len(levels)}), got {self.downsamplings}")
        return self

    @property
    def downsampling(self) -> int:
        return self.patch * 2**self.halvings * self.fold

    @property
    def halvings(self) -> int:
        """The number of levels that halve the resolution."""
        return len(self.multipliers) - 1 if self.downsamplings is None else self.downsamplings


class VQGAN(Convolutional):
    """VQGAN's and IBQ's convolutions, with attention at the deepest level.

    Images (B, C, H, W) to latents (B, z_channels, H / f, W / f) and back; any multiples of the factor f.

    Args:
        config: see `VQGANConfig`.
    """

    config_class = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.z_channels = config.z_channels

    def projection(self, channels_in: int, channels_out: int) -> nn.Module:
        kernel = self.config.projection_kernel
        return nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)

    def projections(self, before: int, after: int) -> tuple[nn.Module, nn.Module]:
        fold = self.config.fold
        if fold == 1:
            return super().projections(before, after)
        if before % fold**2 or after % fold**2:
            raise UsageError(
                f"fold = {fold} makes one latent of {fold**2}: the codes' dimension must be a multiple of {fold**2}, "
                f"got {before if before % fold**2 else after}"
            )
        kernel = self.config.projection_kernel
        return (
            Folding(self.z_channels, before // fold**2, kernel, fold),
            Unfolding(after // fold**2, self.decoder_channels, kernel, fold),
        )


class Folding(nn.Conv2d):
    """A projection of latents (B, C, H, W), squares of which then are one: (B, fold^2 D, H / fold, W / fold)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, fold: int) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        self.fold = fold

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as in torch)
        x = super().forward(input)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // self.fold, self.fold, width // self.fold, self.fold)
        return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # rows, columns, then channels


class Unfolding(nn.Conv2d):
    """The way back of `Folding`, before a projection: (B, fold^2 D, h, w) to (B, C, fold h, fold w)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, fold: int) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        self.fold = fold

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as in torch)
        height, width = input.shape[2:]
        x = input.view(len(input), self.fold, self.fold, -1, height, width).permute(0, 3, 4, 1, 5, 2)
        return super().forward(x.reshape(len(input), -1, height * self.fold, width * self.fold))


class Encoder(nn.Module):
    """Images (B, C, H, W) to latents (B, z_channels, H / f, W / f), f = config.downsampling; any multiple of f."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        self.wavelets = config.patch.bit_length() - 1  # how often the image becomes its wavelets, exactly and unlearned
        self.conv_in = conv3x3(config.channels * config.patch**2, config.width)
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
    """Latents (B, z_channels, h, w) to images (B, C, h f, w f), not clamped."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, groups = [*config.widths[1:], config.widths[-1]], config.groups
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.middle = Middle(widths[-1], groups, config.middle_attention)
        # Levels and upsamplings are numbered by resolution like the encoder's and run from the last to the first.
        self.levels = nn.ModuleList(
            Level(before, after, config.residual_blocks + 1, groups, attention=number in config.attention_levels)
            for number, (after, before) in enumerate(pairwise(widths))
        )
        # Levels from this one on double the resolution.
        self.first_upsampled = len(config.multipliers) - config.halvings
        self.upsamples = nn.ModuleList(Upsample(width) for width in widths[self.first_upsampled : -1])
        self.norm_out = norm(widths[0], groups)
        self.conv_out = conv3x3(widths[0], config.channels * config.patch**2)
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
