"""Tokenizers without weights, for tests of what stands on tokenizers: any object with four methods will do."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lexel.errors import UsageError
from lexel.token_spec import TokenSpec


class Grey:
    """The mean of every 4 x 4 patch as one of 64 greys."""

    codebook_size = 64
    factor = 4

    def encode(self, images: Tensor) -> Tensor:
        return ((F.avg_pool2d(images, 4).mean(1) + 1) / 2 * 63).round().long()

    def decode(self, indices: Tensor) -> Tensor:
        grey = indices[:, None].float() / 63 * 2 - 1
        return F.interpolate(grey, scale_factor=4).expand(-1, 3, -1, -1)

    def token_spec(self, height: int, width: int) -> TokenSpec:
        if height % self.factor or width % self.factor:
            raise UsageError(f"sides must be multiples of {self.factor}, got {height} x {width}")
        return TokenSpec(((height // self.factor, width // self.factor),), self.codebook_size)

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.factor) * self.factor, -(-width // self.factor) * self.factor

    def fingerprint(self) -> str:
        return type(self).__name__.lower()


class Palette(Grey):
    """4 x 4 pixels become one of 4,096 colours, enlarged bilinearly."""

    codebook_size = 4096

    def encode(self, images: Tensor) -> Tensor:
        levels = ((F.avg_pool2d(images, 4) + 1) / 2 * 15).round().long().clamp(0, 15)
        return levels[:, 0] * 256 + levels[:, 1] * 16 + levels[:, 2]

    def decode(self, indices: Tensor) -> Tensor:
        levels = torch.stack([indices // 256, indices // 16 % 16, indices % 16], 1)
        return F.interpolate(levels.float() / 15 * 2 - 1, scale_factor=4, mode="bilinear")
