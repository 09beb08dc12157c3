"""The autoencoder of Open-MAGVIT2 (https://arxiv.org/abs/2409.04410).

Convolutions only, no biases in the blocks, and a decoder whose levels are scaled and shifted by the statistics of the
quantized latents.
"""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from lexel.autoencoders.base import AutoencoderConfig
from lexel.autoencoders.convolutional import Convolutional, ConvolutionalConfig, DepthToSpace, Level, conv3x3, norm
from lexel.errors import UsageError

# Options of `vqgan` that recipes and folders of version 0.1 write for every design, with the values they then have.
ABSENT = {"attention_levels": ([],), "middle_attention": (False,), "patch": (1,), "downsamplings": (None,)}


class PlainConfig(ConvolutionalConfig):
    """The size of an encoder and decoder of convolutions only."""

    @model_validator(mode="before")
    @classmethod
    def _without_attention(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        for name, values in ABSENT.items():
            if name in table and table[name] not in values:
                what = "attention" if "attention" in name else name
                raise ValueError(f"the {cls.model_fields['kind'].default} autoencoder has no {what}; leave {name} out")
        return {name: value for name, value in table.items() if name not in ABSENT}


class MagvitConfig(PlainConfig):
    """The size of Open-MAGVIT2's encoder and decoder."""

    kind: Literal["magvit2"] = "magvit2"


class Magvit(Convolutional):
    """Open-MAGVIT2's convolutions, whose decoder is scaled and shifted by the latents' statistics.

    Images (B, C, H, W) to latents (B, z_channels, H / f, W / f) and back, f = 2^(levels - 1).

    Args:
        config: see `MagvitConfig`.
    """

    config_class: ClassVar[type[AutoencoderConfig]] = MagvitConfig
    statistics: ClassVar[bool] = True  # whether the latents' statistics modulate the decoder

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = MagvitEncoder(config), MagvitDecoder(config, self.statistics)
        self.z_channels = config.z_channels


class MagvitEncoder(nn.Module):
    """Images (B, C, H, W) to latents (B, z_channels, H / f, W / f): no attention, no biases in the blocks."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        widths, groups, blocks = config.widths, config.groups, config.residual_blocks
        self.conv_in = conv3x3(config.channels, config.width, bias=False)
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
    """Latents (B, z_channels, h, w) to images (B, C, h f, w f), not clamped.

    The statistics of the latents scale and shift the input of every level; the grid must have at least two positions,
    for they hold an unbiased variance. SimVQ's decoder is the same without statistics.
    """

    def __init__(self, config: ConvolutionalConfig, statistics: bool) -> None:
        super().__init__()
        widths, groups, blocks = [*config.widths[1:], config.widths[-1]], config.groups, config.residual_blocks
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.middle = Level(widths[-1], widths[-1], blocks, groups, bias=False)
        self.adaptive = nn.ModuleList(
            AdaptiveNorm(config.z_channels, before, groups) for before in widths[1:] if statistics
        )
        self.levels = nn.ModuleList(
            Level(before, after, blocks, groups, bias=False) for after, before in pairwise(widths)
        )
        self.upsamples = nn.ModuleList(DepthToSpace(width) for width in widths[1:-1])
        self.norm_out = norm(widths[0], groups)
        self.conv_out = conv3x3(widths[0], config.channels)

    def forward(self, z: Tensor) -> Tensor:
        if self.adaptive and z.shape[2] * z.shape[3] < 2:
            raise UsageError(f"the magvit2 decoder needs at least two latents an image, got a grid of {z.shape[2:]}")
        x = self.middle(self.conv_in(z))
        for number in reversed(range(len(self.levels))):
            x = self.levels[number](self.adaptive[number](x, z) if self.adaptive else x)
            if number > 0:
                x = self.upsamples[number - 1](x)
        return self.conv_out(F.silu(self.norm_out(x)))


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
