"""Parts of bidirectional transformers that several families share: attention, MLP, pre-norm block."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn


def call(block: nn.Module, *inputs: Any) -> Any:
    """A block's output."""
    return block(*inputs)


class Attention(nn.Module):
    """Self-attention over all tokens, without a mask."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, T, 3, heads, C / heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (N, heads, T, C / heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))  # (N, T, C)


class MLP(nn.Module):
    """Two linear layers with GELU between, exact or by tanh."""

    def __init__(self, width: int, hidden: int, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.approximate: Literal["none", "tanh"] = approximate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (N, T, C)
        return x + self.mlp(self.norm2(x))  # (N, T, C)
