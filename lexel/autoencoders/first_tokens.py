"""Nested dropout over an image's tokens in a row: FlexTok (https://arxiv.org/abs/2502.13967), One-D-Piece
(https://arxiv.org/abs/2501.10064).
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lexel.config import Config
from lexel.nested_dropout import Keep, NestedDropout


class NestedConfig(Config):
    """How many of the first tokens training keeps; see `NestedDropout`."""

    keep: Keep = "uniform"
    full: float = Field(default=0.0, ge=0, le=1)
    least: int = Field(default=1, ge=1)


class FirstTokens(nn.Module):
    """Keeps the first of an image's tokens (B, C, N); a learned vector stands for each that is left out.

    In training their number is drawn; in evaluation all that are given are kept.
    """

    def __init__(self, tokens: int, width: int, config: NestedConfig) -> None:
        super().__init__()
        self.dropout = NestedDropout(tokens, config.keep, config.full, config.least)
        self.left_out = nn.Parameter(torch.randn(width).mul_(width**-0.5))

    def forward(self, z: Tensor) -> Tensor:
        kept = torch.full((len(z),), z.shape[2], device=z.device)
        if self.training:
            kept = self.dropout.draw(len(z), z.device)
        return self.cut(F.pad(z, (0, self.dropout.count - z.shape[2])), kept)

    def cut(self, z: Tensor, kept: Tensor) -> Tensor:
        """Tokens (B, C, N) of which the first `kept` (B,) stay."""
        stays = torch.arange(z.shape[2], device=z.device) < kept[:, None]  # (B, N)
        return torch.where(stays[:, None], z, self.left_out[:, None].to(z.dtype))
