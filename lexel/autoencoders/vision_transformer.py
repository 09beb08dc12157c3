"""Parts of transformer autoencoders: pre-norm blocks, positions, patches, images in [0, 1]."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config


class TransformerSize(Config):
    """The size of a transformer."""

    width: int = Field(default=512, ge=1)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=8, ge=1)
    mlp: int | None = Field(default=None, ge=1)  # width of the hidden layer; 4 * width if not given

    @property
    def hidden(self) -> int:
        return self.mlp or 4 * self.width


class DividedSize(TransformerSize):
    """The size of a transformer whose heads share the width."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "DividedSize":
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self


class Block(nn.Module):
    """Self-attention and a hidden layer, each after a layer normalization and added to its input.

    Args:
        size: width, heads and hidden layer.
        head_width: channels of a head.
        bias: whether query, key and value have one.
        activation: of the hidden layer.
    """

    def __init__(
        self, size: TransformerSize, head_width: int, bias: bool, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.heads, self.activation = size.heads, activation
        inner = size.heads * head_width
        self.norm1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.fc1 = nn.Linear(size.width, size.hidden)
        self.fc2 = nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)  # (B, T, 3, heads, head width)
        attended = F.scaled_dot_product_attention(*qkv.transpose(1, 3).unbind(2))  # (B, heads, T, head width)
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # (B, T, C)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def sincos(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the positions of a grid: (rows * columns, width), float32.

    The first half of the channels is of the column, the second of the row; each is sines, then cosines, at
    width / 4 frequencies from 1 down to 1 / 10000.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    halves = []
    for positions in (torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)):
        angles = positions.double()[:, None] * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, 1).float()


def to_unit(images: Tensor) -> Tensor:
    """Images from [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def from_unit(images: Tensor) -> Tensor:
    """Images from [0, 1] to [-1, 1]."""
    return 2 * images - 1
