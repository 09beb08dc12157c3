"""Transformers that predict the next token of an image, given its class.

`ClassConditional` is the network of IBQ (https://arxiv.org/abs/2412.02692): Llama blocks whose norms are scaled and
shifted by the class. `Factorised` is that of Open-MAGVIT2 (https://arxiv.org/abs/2409.04410) for vocabularies too large
for one head: every token is a pair of sub-tokens, and a small second transformer predicts the pair.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lexel.config import Config
from lexel.errors import UsageError

EPSILON = 1e-5  # of every norm

# The published sizes: 16,384 codes, a grid of 16 x 16, 1,000 classes.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "B": {"layers": 16, "heads": 16, "width": 1024, "gamma_init": 1e-3},
    "L": {"layers": 20, "heads": 20, "width": 1280, "gamma_init": 1e-3},
    "XL": {"layers": 24, "heads": 24, "width": 1536, "gamma_init": 1e-4},
    "XXL": {"layers": 30, "heads": 30, "width": 1920, "gamma_init": 1e-5},
}
FACTORISED_SIZES: Mapping[str, Mapping[str, Any]] = {  # 262,144 codes as 64 x 4,096
    "B": {"layers": 24, "pair_layers": 2, "heads": 16, "width": 1024},
    "L": {"layers": 36, "pair_layers": 3, "heads": 20, "width": 1280},
    "XL": {"layers": 48, "pair_layers": 4, "heads": 24, "width": 1536},
}
LARGEST_PLAIN_HEAD = 2**18  # from this vocabulary on, `head = "auto"` is factorised


class TransformerConfig(Config):
    """The shape of a transformer over the tokens of an image.

    `classes` does not count the null class, which is number `classes`. `factors` are the sizes of the two
    sub-vocabularies of the factorised head, the low digit first: token = first + factors[0] * second.
    """

    codebook_size: int = Field(default=16384, ge=2)
    rows: int = Field(default=16, ge=1)
    columns: int = Field(default=16, ge=1)
    classes: int = Field(default=1000, ge=1)
    width: int = Field(default=1024, ge=4)
    layers: int = Field(default=16, ge=1)
    heads: int = Field(default=16, ge=1)
    head: str = "auto"
    pair_layers: int = Field(default=2, ge=1)
    factors: list[int] | None = None
    dropout: float = Field(default=0.1, ge=0, lt=1)
    class_dropout: float = Field(default=0.1, ge=0, le=1)
    gamma_init: float = Field(default=1e-3, ge=0)
    modulated: bool = True  # whether the class scales and shifts every norm; a factorised head never does

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.rows * self.columns

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """The sizes of the sub-vocabularies; their product is the codebook's size."""
        if self.head == "plain" or (self.head == "auto" and self.codebook_size < LARGEST_PLAIN_HEAD):
            return (self.codebook_size,)
        return tuple(self.factors) if self.factors is not None else factorise(self.codebook_size)


def factorise(codebook_size: int) -> tuple[int, int]:
    """Two factors of a codebook's size, the first as near its cube root as divisors allow: 262,144 is 64 x 4,096.

    Raises:
        UsageError: the size is a prime.
    """
    divisors = [d for d in range(2, math.isqrt(codebook_size) + 1) if codebook_size % d == 0]
    if not divisors:
        raise UsageError(
            f'a factorised head needs a codebook size with factors, and {codebook_size} is prime; use head = "plain"'
        )
    first = min(divisors, key=lambda d: abs(math.log(d) - math.log(codebook_size) / 3))
    return first, codebook_size // first


def build(config: TransformerConfig) -> "ClassConditional | ClassStart | Factorised":
    """The transformer a config describes, freshly initialised.

    Raises:
        UsageError: the heads do not divide the width into multiples of 4, or the head's kind or factors are wrong.
    """
    if config.width % config.heads or (config.width // config.heads) % 4:
        raise UsageError(
            f"width / heads must be a multiple of 4 (two axes of rotated pairs), got {config.width} / {config.heads}"
        )
    if config.head not in ("auto", "plain", "factorised"):
        raise UsageError(f"unknown head {config.head!r}; choose from auto, factorised, plain")
    if len(config.vocabularies) == 1:
        return ClassConditional(config) if config.modulated else ClassStart(config)
    if (
        len(config.vocabularies) != 2
        or min(config.vocabularies) < 2
        or math.prod(config.vocabularies) != config.codebook_size
    ):
        raise UsageError(
            f"factors must be two numbers whose product is codebook_size = {config.codebook_size}, "
            f"got {list(config.vocabularies)}"
        )
    return Factorised(config)


def split_tokens(indices: Tensor, vocabularies: tuple[int, ...]) -> list[Tensor]:
    """The sub-tokens of tokens of any shape, the low digit first; a plain vocabulary has one."""
    if len(vocabularies) == 1:
        return [indices]
    return [indices % vocabularies[0], indices // vocabularies[0]]


def join_tokens(parts: list[Tensor], vocabularies: tuple[int, ...]) -> Tensor:
    """The tokens whose sub-tokens are `parts`."""
    return parts[0] if len(parts) == 1 else parts[0] + vocabularies[0] * parts[1]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean of squares in at least float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * self.weight


@functools.lru_cache(maxsize=16)
def rotations(rows: int, columns: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of 2-D rotary positions: float32 (1 + rows * columns, head_dim / 2, 2).

    Half of the pairs turn with the row, half with the column. The class slot, position 0, has cosine and sine 0, so
    its query and key vanish: every position attends to the class with logit 0. Published weights need this.
    """
    with torch.inference_mode(False):  # the cached table must serve training too
        pairs = head_dim // 4
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        row = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None, None] * frequencies
        column = torch.arange(columns, dtype=torch.float64, device="cpu")[None, :, None] * frequencies
        angles = torch.cat([row.expand(rows, columns, pairs), column.expand(rows, columns, pairs)], -1).flatten(0, 1)
        table = torch.stack([angles.cos(), angles.sin()], -1).float()
        return torch.cat([table.new_zeros(1, *table.shape[1:]), table]).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the interleaved pairs of x (B, T, heads, head_dim) by table (T, head_dim / 2, 2), in the table's dtype."""
    a, b = x.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table[:, None, :, 0], table[:, None, :, 1]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; no biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x (B, T, C), table (T, head_dim / 2, 2) from `rotations`: (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (B, T, heads, head_dim) each
        q, k = rotate(q, table), rotate(k, table)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))


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

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ConditionalBlock(Block):
    """A Llama block whose norms are scaled and shifted, and whose branches are scaled, by a condition (B, 1, C)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads, dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, table: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(F.silu(condition)).chunk(6, -1)
        x = x + gamma1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, table)
        return x + gamma2 * self.feed_forward(self.feed_forward_norm(x) * (1 + scale2) + shift2)


class _Transformer(nn.Module):
    """What both networks share: the classes, positions, initialisation and memory saving."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabularies = config.vocabularies
        self.classes = nn.Embedding(config.classes + 1, config.width)  # the last row is the null class
        self.dropout = nn.Dropout(config.dropout)
        self.norm = RMSNorm(config.width)
        # Recompute the activations of every block in the backward pass: the memory of one block, a third more time.
        self.checkpointing = False

    def _initialise(self) -> None:
        """Every matrix and embedding N(0, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def positions(self, like: Tensor) -> Tensor:
        """The rotations of all positions, class slot first, on the device of `like`, in at least float32."""
        config = self.config
        table = rotations(config.rows, config.columns, config.width // config.heads, like.device)
        return table.to(torch.promote_types(like.dtype, torch.float32))

    def drop_classes(self, class_labels: Tensor) -> Tensor:
        """In training, replaces each label by the null class with probability `class_dropout`; labels (B,)."""
        if not self.training or self.config.class_dropout == 0:
            return class_labels
        dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.config.class_dropout
        return class_labels.masked_fill(dropped, self.config.classes)

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class ClassConditional(_Transformer):
    """IBQ's generator: the class is the start token and modulates every norm (adaptive layer norm)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        width = config.width
        self.tokens = nn.Embedding(config.codebook_size, width)
        blocks = [ConditionalBlock(width, config.heads, config.dropout) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.modulation = nn.Linear(width, 2 * width)  # of the last norm
        self.head = nn.Linear(width, config.codebook_size, bias=False)

        self._initialise()
        with torch.no_grad():
            for block in blocks:
                block.modulation.weight[: 2 * width].mul_(config.gamma_init)  # branches begin almost closed
                block.modulation.weight[2 * width :].mul_(0.5)
            self.modulation.weight.mul_(0.5)
            self.head.weight.zero_()

    def forward(self, indices: Tensor, class_labels: Tensor) -> tuple[Tensor]:
        """Logits of every token given those before it: ((B, T, codebook_size),) for indices (B, T), labels (B,)."""
        condition = self.classes(self.drop_classes(class_labels))[:, None]  # (B, 1, C)
        x = self.dropout(torch.cat([condition, self.tokens(indices[:, :-1])], 1))
        table = self.positions(x)[: x.shape[1]]
        for block in self.blocks:
            x = self.run(block, x, table, condition)
        scale, shift = self.modulation(F.silu(condition)).chunk(2, -1)
        return (self.head(self.norm(x) * (1 + scale) + shift),)


class ClassStart(_Transformer):
    """LlamaGen's generator (https://arxiv.org/abs/2406.06525): the class is the start token and nothing more."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.codebook_size, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)

        self._initialise()
        with torch.no_grad():
            self.head.weight.zero_()

    def forward(self, indices: Tensor, class_labels: Tensor) -> tuple[Tensor]:
        """Logits of every token given those before it: ((B, T, codebook_size),) for indices (B, T), labels (B,)."""
        start = self.classes(self.drop_classes(class_labels))[:, None]  # (B, 1, C)
        x = self.dropout(torch.cat([start, self.tokens(indices[:, :-1])], 1))
        table = self.positions(x)[: x.shape[1]]
        for block in self.blocks:
            x = self.run(block, x, table)
        return (self.head(self.norm(x)),)


class Factorised(_Transformer):
    """Open-MAGVIT2's generator: tokens are pairs (first, second), predicted one after the other at every position."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        width, heads = config.width, config.heads
        self.tokens = nn.ModuleList(nn.Embedding(size, width) for size in config.vocabularies)
        self.blocks = nn.ModuleList(Block(width, heads, config.dropout) for _ in range(config.layers))
        self.pair_blocks = nn.ModuleList(Block(width, heads, config.dropout) for _ in range(config.pair_layers))
        outputs = [nn.Linear(width, size, bias=False) for size in config.vocabularies]
        self.heads = nn.ModuleList(outputs)

        self._initialise()
        with torch.no_grad():
            for head in outputs:
                head.weight.zero_()

    def forward(self, indices: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both sub-tokens: (B, T, first), (B, T, second given first) for indices (B, T), labels (B,)."""
        first, second = (
            embed(part) for embed, part in zip(self.tokens, split_tokens(indices, self.vocabularies), strict=True)
        )
        condition = self.classes(self.drop_classes(class_labels))[:, None]
        x = self.dropout(torch.cat([condition, (first + second)[:, :-1]], 1))  # (B, T, C)
        table = self.positions(x)[: x.shape[1]]
        for block in self.blocks:
            x = self.run(block, x, table)

        pairs = torch.stack([x, first], 2).flatten(0, 1)  # (B * T, 2, C)
        for block in self.pair_blocks:
            pairs = self.run(block, pairs, table[:2])  # rotations: none of position 0, the identity of position 1
        pairs = self.norm(pairs).unflatten(0, x.shape[:2])
        return self.heads[0](pairs[:, :, 0]), self.heads[1](pairs[:, :, 1])
