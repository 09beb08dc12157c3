"""The autoencoder of VQ-VAE-2: two levels of latents (https://arxiv.org/abs/1906.00446).

Facts are those of rosinality/vq-vae-2-pytorch.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.autoencoders.base import Autoencoder, AutoencoderConfig
from lexel.autoencoders.vqvae import decoder, encoder, last_weight
from lexel.errors import UsageError


class VQVAE2Config(AutoencoderConfig):
    """The size of VQ-VAE-2's encoders and decoders."""

    kind: Literal["vqvae2"] = "vqvae2"
    width: int = Field(default=128, ge=2, multiple_of=2)
    residual_blocks: int = Field(default=2, ge=0)
    residual_width: int = Field(default=32, ge=1)  # channels inside a residual block
    z_channels: int = Field(default=64, ge=1)  # of both levels: the codes' dimension, for there are no projections
    size: list[int] | None = None  # [height, width] of all images; None takes any square

    @model_validator(mode="after")
    def _size_fits(self) -> "VQVAE2Config":
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1 or any(side % 8 for side in self.size)):
            raise ValueError(f"size must be [height, width], multiples of 8, got {self.size}")
        return self


class VQVAE2(Autoencoder):
    """VQ-VAE-2's convolutions: a coarse grid of tokens, then one twice as fine.

    Images (B, C, H, W) to latents (B, z_channels, T) and back; the grids are H / 8 x W / 8 and H / 4 x W / 4.

    The fine latents are made of the image and of the coarse level's codes. T counts the cells of both grids, so
    images are squares unless `size` says what they are.

    Args:
        config: see `VQVAE2Config`.
    """

    config_class = VQVAE2Config
    axes = 1
    shares = (1, 4)
    config: VQVAE2Config

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.z_channels = config.z_channels

    @property
    def downsampling(self) -> None:
        return None

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return None if self.config.size is None else (self.config.size[0], self.config.size[1])

    @property
    def sizes(self) -> str:
        return "H = W, a multiple of 8" if self.fixed_size is None else super().sizes

    @property
    def last_layer(self) -> nn.Parameter:
        assert isinstance(self.decoder, Decoder)
        return last_weight(self.decoder.pixels)

    def grids(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        fits = (height, width) == self.fixed_size if self.fixed_size else height == width and height % 8 == 0 < height
        if not fits:
            raise UsageError(f"images need {self.sizes}, got {height} x {width}")
        return (height // 8, width // 8), (height // 4, width // 4)

    def grid(self, height: int, width: int) -> tuple[int, ...]:
        return (sum(math.prod(grid) for grid in self.grids(height, width)),)

    def image_size(self, grid: tuple[int, ...]) -> tuple[int, int]:
        if len(grid) == 1:
            height, width = coarse(grid[0], self.config)
            if height and 5 * height * width == grid[0]:
                return 8 * height, 8 * width
        raise UsageError(f"images with {self.sizes} have 5 H W / 64 tokens (T,), got {tuple(grid)}")

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        if self.fixed_size is None:
            side = -(-max(height, width) // 8) * 8
            return side, side
        return super().fitting_size(height, width)


def coarse(cells: int, config: VQVAE2Config) -> tuple[int, int]:
    """Rows and columns of the coarse grid where both grids have so many cells."""
    if config.size is not None:
        return config.size[0] // 8, config.size[1] // 8
    side = math.isqrt(cells // 5)
    return side, side


class Encoder(nn.Module):
    """Images to the latents of both levels (B, z_channels, T); `codes` gives a level's codes for its latents."""

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__()
        sizes = config.width, config.residual_blocks, config.residual_width
        self.bottom = encoder(config.channels, *sizes, factor=4)
        self.top = encoder(config.width, *sizes, factor=2)
        self.to_top = nn.Conv2d(config.width, config.z_channels, 1)
        self.from_top = decoder(config.z_channels, config.z_channels, *sizes, factor=2)
        self.to_bottom = nn.Conv2d(config.z_channels + config.width, config.z_channels, 1)

    def forward(self, images: Tensor, codes: Callable[[int, Tensor], Tensor]) -> Tensor:
        bottom = self.bottom(images)  # (B, width, H / 4, W / 4)
        z_top = self.to_top(self.top(bottom))  # (B, D, H / 8, W / 8)
        described = self.from_top(codes(0, z_top).to(z_top.dtype))  # (B, D, H / 4, W / 4)
        z_bottom = self.to_bottom(torch.cat([described, bottom], 1))
        return torch.cat([z_top.flatten(2), z_bottom.flatten(2)], 2)


class Decoder(nn.Module):
    """Codes of both levels (B, z_channels, T) to images (B, C, H, W), not clamped."""

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__()
        self.config = config
        sizes = config.width, config.residual_blocks, config.residual_width
        self.upsample = nn.ConvTranspose2d(config.z_channels, config.z_channels, 4, 2, 1)
        self.pixels = decoder(2 * config.z_channels, config.channels, *sizes, factor=4)

    def forward(self, z: Tensor) -> Tensor:
        rows, columns = coarse(z.shape[2], self.config)
        top, bottom = z.split([rows * columns, 4 * rows * columns], 2)
        top, bottom = top.unflatten(2, (rows, columns)), bottom.unflatten(2, (2 * rows, 2 * columns))
        return self.pixels(torch.cat([self.upsample(top), bottom], 1))
