"""ViT-VQGAN: transformers instead of convolutions (https://arxiv.org/abs/2110.04627).

Facts of the sizes and conventions are those of the usual implementation, thuanz123/enhancing-transformers.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.autoencoders.base import Autoencoder, AutoencoderConfig
from lexel.autoencoders.vision_transformer import Block, TransformerSize, from_unit, sincos, to_unit


class ViTConfig(AutoencoderConfig):
    """The sizes of ViT-VQGAN's encoder and decoder; the defaults are those of its "small" model."""

    kind: Literal["vit"] = "vit"
    patch: int = Field(default=8, ge=1)  # pixels of a side for one token
    encoder: TransformerSize = TransformerSize()
    decoder: TransformerSize = TransformerSize()
    head_width: int = Field(default=64, ge=1)  # channels of an attention head, whatever the width

    @model_validator(mode="after")
    def _positions_fit(self) -> "ViTConfig":
        for name, size in (("encoder", self.encoder), ("decoder", self.decoder)):
            if size.width % 4:
                raise ValueError(f"{name}.width must be a multiple of 4 for its positions, got {size.width}")
        return self


class ViT(Autoencoder):
    """ViT-VQGAN's transformers over patches.

    Images (B, C, H, W) to latents (B, width, H / patch, W / patch) and back; any multiples of the patch.

    Args:
        config: see `ViTConfig`.
    """

    config_class = ViTConfig
    LAST = "pixels.weight"
    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.z_channels = config.encoder.width

    @property
    def decoder_channels(self) -> int:
        return self.config.decoder.width

    @property
    def downsampling(self) -> int:
        return self.config.patch


class Encoder(nn.Module):
    """Images (B, C, H, W) to (B, width, h, w): patches with fixed positions, blocks, a last normalization."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.encoder
        self.patches = nn.Conv2d(config.channels, size.width, config.patch, config.patch)
        self.blocks = nn.ModuleList(Block(size, config.head_width, False, torch.tanh) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(to_unit(images))  # (B, C, h, w)
        return transformed(x, self.blocks, self.norm)


class Decoder(nn.Module):
    """(B, width, h, w) to images (B, C, H, W), not clamped: positions, blocks, and each token a patch of pixels."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.decoder
        self.blocks = nn.ModuleList(Block(size, config.head_width, False, torch.tanh) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.pixels = nn.ConvTranspose2d(size.width, config.channels, config.patch, config.patch)
        self.apply(initialise)
        nn.init.constant_(self.pixels.get_parameter("bias"), 0.5)  # pictures start grey; the published ones start black

    def forward(self, z: Tensor) -> Tensor:
        return from_unit(self.pixels(transformed(z, self.blocks, self.norm)))


def transformed(x: Tensor, blocks: nn.ModuleList, norm: nn.LayerNorm) -> Tensor:
    """A map (B, C, h, w) with positions through transformer blocks."""
    rows, columns = x.shape[2:]
    positions = sincos(rows, columns, x.shape[1]).to(x)
    y = x.flatten(2).transpose(1, 2) + positions  # (B, h w, C)
    for block in blocks:
        y = block(y)
    return norm(y).transpose(1, 2).unflatten(2, (rows, columns))


def initialise(module: nn.Module) -> None:
    """Uniform weights of the variance 2 / (inputs + outputs), a patch counting as one vector; biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.detach().flatten(1))  # a view of the weight
        if module.bias is not None:
            nn.init.zeros_(module.bias)
