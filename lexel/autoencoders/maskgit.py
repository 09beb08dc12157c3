"""The autoencoder of MaskGIT's tokenizer (https://arxiv.org/abs/2202.04200): convolutions only, whose codes TiTok's
first stage predicts. Facts are those of the PyTorch port in bytedance/1d-tokenizer.
"""

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lexel.autoencoders.base import AutoencoderConfig
from lexel.autoencoders.convolutional import Convolutional, ConvolutionalConfig, Upsample, conv3x3, norm
from lexel.autoencoders.vision_transformer import from_unit, to_unit


class MaskGITConfig(ConvolutionalConfig):
    """The size of MaskGIT's encoder and decoder; the defaults are the published ones."""

    LATER = {"middle_blocks": None}

    kind: Literal["maskgit"] = "maskgit"
    residual_blocks: int = Field(default=2, ge=1)  # in each level, and between the deepest levels
    middle_blocks: int | None = Field(default=None, ge=1)  # between the deepest levels, where it is another number

    identity = AutoencoderConfig.identity


class MaskGIT(Convolutional):
    """MaskGIT's convolutions, without attention.

    Images (B, C, H, W) to latents (B, z_channels, H / f, W / f) and back, f = 2^(levels - 1).

    Args:
        config: see `MaskGITConfig`.
    """

    config_class = MaskGITConfig
    config: MaskGITConfig

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.z_channels = config.z_channels


class Encoder(nn.Module):
    """Images (B, C, H, W) to (B, z_channels, h, w); levels are followed by the mean of 2 x 2 positions."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        widths, groups, blocks = config.widths, config.groups, config.residual_blocks
        self.conv_in = conv3x3(config.channels, config.width, bias=False)
        self.levels = nn.ModuleList(level(before, after, blocks, groups) for before, after in pairwise(widths))
        self.middle = level(widths[-1], widths[-1], config.middle_blocks or blocks, groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(to_unit(images))
        for number, blocks in enumerate(self.levels):
            x = blocks(x)
            if number < len(self.levels) - 1:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) to images (B, C, H, W), not clamped."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        widths, groups, blocks = [*config.widths[1:], config.widths[-1]], config.groups, config.residual_blocks
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.middle = level(widths[-1], widths[-1], config.middle_blocks or blocks, groups)
        # Numbered by resolution like the encoder's levels, and run from the last to the first.
        self.levels = nn.ModuleList(level(before, after, blocks, groups) for after, before in pairwise(widths))
        self.upsamples = nn.ModuleList(Upsample(width) for width in widths[1:-1])
        self.norm_out = norm(widths[0], groups)
        self.conv_out = conv3x3(widths[0], config.channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for number in reversed(range(len(self.levels))):
            x = self.levels[number](x)
            if number > 0:
                x = self.upsamples[number - 1](x)
        return from_unit(self.conv_out(F.silu(self.norm_out(x))))


class Block(nn.Module):
    """Twice normalization, swish and a 3x3 convolution without bias, added to the input.

    Where the number of channels changes, the published code projects the block's own result instead of its input:
    the input is then not added.
    """

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(before, groups)
        self.conv1 = conv3x3(before, after, bias=False)
        self.norm2 = norm(after, groups)
        self.conv2 = conv3x3(after, after, bias=False)
        self.shortcut = nn.Conv2d(after, after, 1, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(y))


def level(before: int, after: int, blocks: int, groups: int) -> nn.Sequential:
    """The residual blocks of one resolution."""
    return nn.Sequential(*(Block(a, b, groups) for a, b in pairwise([before] + [after] * blocks)))
