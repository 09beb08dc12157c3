"""Blocks of next-token transformers: Llama's, plain or modulated by a condition, and GPT's."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.runtime import at_least_float32

EPSILON = 1e-5  # of every norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean of squares in at least float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * self.weight


@functools.lru_cache(maxsize=16)
def rope_table(grid: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary positions of a grid's cells: float32 (cells, head_dim / 2, 2).

    On a grid of rows and columns half of the pairs turn with the row, half with the column; on a line all turn with the
    place (https://arxiv.org/abs/2104.09864).
    """
    with torch.inference_mode(False):  # the cached table must serve training too
        pairs = head_dim // 2 // len(grid)
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        places = [torch.arange(side, dtype=torch.float64, device="cpu") for side in grid]
        axes = [place.reshape(-1, 1) * frequencies for place in torch.meshgrid(*places, indexing="ij")]
        angles = torch.cat(axes, -1)
        return torch.stack([angles.cos(), angles.sin()], -1).float().to(device)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the interleaved pairs of x (B, T, heads, D) by rope (T, D / 2, 2) or (B, T, D / 2, 2), in its dtype."""
    a, b = x.to(rope.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rope[..., None, :, 0], rope[..., None, :, 1]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; no biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x (B, T, C), rope (T, head_dim / 2, 2) from `rope_table`: (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (B, T, heads, head_dim) each
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x); the hidden width is 8/3 of the width, rounded up to a multiple of 256."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-(2 * 4 * width // 3) // 256) * 256
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """A Llama block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)
        self.attention_norm = RMSNorm(width)
        self.feed_forward_norm = RMSNorm(width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ConditionalBlock(Block):
    """A Llama block whose norms are scaled and shifted, and whose branches are scaled, by a condition (B, 1, C)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads, dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, rope: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(F.silu(condition)).chunk(6, -1)
        x = x + gamma1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, rope)
        return x + gamma2 * self.feed_forward(self.feed_forward_norm(x) * (1 + scale2) + shift2)


class BiasedAttention(nn.Module):
    """Causal self-attention with biases and without rotary positions."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # (B, heads, T, head_dim)
        rate = self.rate if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))


class GPTBlock(nn.Module):
    """GPT-2's block: layer norms before the branches, a feed-forward layer of four times the width with GELU."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, EPSILON)
        self.attention = BiasedAttention(width, heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(width, EPSILON)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T, C) to (B, T, C); positions are in x already."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.feed_forward_norm(x)))))
