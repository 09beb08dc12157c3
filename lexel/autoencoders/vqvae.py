"""The autoencoder of the original VQ-VAE: the smallest (https://arxiv.org/abs/1711.00937).

Two or more strided convolutions and a few residual blocks, without normalization. Facts are those of
rosinality/vq-vae-2-pytorch.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lexel.autoencoders.base import Autoencoder, AutoencoderConfig


class VQVAEConfig(AutoencoderConfig):
    """The size of VQ-VAE's encoder and decoder."""

    kind: Literal["vqvae"] = "vqvae"
    width: int = Field(default=128, ge=2, multiple_of=2)
    residual_blocks: int = Field(default=2, ge=0)
    residual_width: int = Field(default=32, ge=1)  # channels inside a residual block
    downsampling: Literal[2, 4] = 4  # pixels of a side for one latent


class VQVAE(Autoencoder):
    """The original VQ-VAE's strided convolutions and residual blocks, without normalization: the smallest.

    Images (B, C, H, W) to latents (B, width, H / f, W / f) and back, f = 2 or 4; any multiples of f.

    Args:
        config: see `VQVAEConfig`.
    """

    config_class = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        sizes = config.width, config.residual_blocks, config.residual_width
        self.encoder = encoder(config.channels, *sizes, factor=config.downsampling)
        self.decoder = decoder(config.width, config.channels, *sizes, factor=config.downsampling)
        self.z_channels = config.width

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

    @property
    def last_layer(self) -> nn.Parameter:
        return last_weight(self.decoder)


class ResidualBlock(nn.Module):
    """ReLU, a 3x3 convolution, ReLU and a 1x1 convolution, added to the input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def encoder(channels: int, width: int, blocks: int, inner: int, factor: int) -> nn.Sequential:
    """(B, channels, H, W) to (B, width, H / factor, W / factor), with a ReLU at the end."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width // 2, 4, 2, 1), nn.ReLU()]
    if factor == 4:
        layers += [nn.Conv2d(width // 2, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
    else:
        layers += [nn.Conv2d(width // 2, width, 3, padding=1)]
    return nn.Sequential(*layers, *(ResidualBlock(width, inner) for _ in range(blocks)), nn.ReLU())


def decoder(before: int, after: int, width: int, blocks: int, inner: int, factor: int) -> nn.Sequential:
    """(B, before, h, w) to (B, after, h factor, w factor)."""
    residual = [ResidualBlock(width, inner) for _ in range(blocks)]
    layers: list[nn.Module] = [nn.Conv2d(before, width, 3, padding=1), *residual, nn.ReLU()]
    if factor == 4:
        layers += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.ReLU()]
        width //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, after, 4, 2, 1))


def last_weight(network: nn.Module) -> nn.Parameter:
    """The weight of a sequence's last layer."""
    assert isinstance(network, nn.Sequential)
    return network[-1].get_parameter("weight")
