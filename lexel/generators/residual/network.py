"""Transformer over positions and depths of residual codes (RQ-Transformer, https://arxiv.org/abs/2203.01941)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.generators.blocks import call

if TYPE_CHECKING:
    from lexel.generators.residual.generator import ResidualConfig

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block: (B, heads, tokens so far, width / heads)


class CausalAttention(nn.Module):
    """Self-attention to tokens before; keys and values of earlier tokens may be handed in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # each (B, heads, T, C / heads)
        before = 0
        if past is not None:
            before = past[0].shape[2]
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = None
        if before and x.shape[1] > 1:
            mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool, device=x.device).tril(before)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=before == 0)
        return self.proj(attended.transpose(1, 2).flatten(2)), (k, v)


class SigmoidGELU(nn.Module):
    """The sigmoid approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CausalBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, num_heads: int, sigmoid_gelu: bool, dropout: float) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, num_heads)
        gelu = SigmoidGELU() if sigmoid_gelu else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, state = self.attn(self.ln1(x), past)
        x = x + self.dropout(attended)  # (B, T, C)
        return x + self.dropout(self.mlp(self.ln2(x))), state


class CausalTransformer(nn.Module):
    """Blocks of causal attention: (B, T, C) to (B, T, C)."""

    def __init__(self, width: int, depth: int, num_heads: int, sigmoid_gelu: bool, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock(width, num_heads, sigmoid_gelu, dropout) for _ in range(depth))

    def forward(
        self, x: Tensor, cache: Cache | None = None, run: Callable[..., Any] = call, layers: int | None = None
    ) -> tuple[Tensor, Cache]:
        """The output of so many blocks, all of them by default, and the KV cache with these tokens.

        `run` calls a block: a place to recompute activations.
        """
        grown = []
        for number, block in enumerate(self.blocks[:layers]):
            x, state = run(block, x, None if cache is None else cache[number])
            grown.append(state)
        return x, grown


class DepthLinear(nn.Module):
    """A linear layer of its own for each depth: (..., depth, C) to (..., depth, K)."""

    def __init__(self, depth: int, width: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, width, outputs))
        self.bias = nn.Parameter(torch.zeros(depth, outputs))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        depths = slice(first, first + x.shape[-2])
        return torch.einsum("...dc,dck->...dk", x, self.weight[depths]) + self.bias[depths]


class Classifier(nn.Module):
    """Logits of codes from the head's output, by one layer for all depths or by one for each."""

    def __init__(self, width: int, codebook_size: int, depths: int | None) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, codebook_size) if depths is None else DepthLinear(depths, width, codebook_size)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        normed = self.layer_norm(x)
        return self.linear(normed, first) if isinstance(self.linear, DepthLinear) else self.linear(normed)


class DepthEmbedding(nn.Embedding):
    """Learned vectors of codes, (..., depth) to (..., depth, C): a table for each depth, or one if it is shared."""

    def __init__(self, depths: int, codebook_size: int, width: int, shared: bool = False) -> None:
        super().__init__((1 if shared else depths) * codebook_size, width)
        self.stride = 0 if shared else codebook_size

    def forward(self, codes: Tensor, first: int = 0) -> Tensor:
        depth = torch.arange(first, first + codes.shape[-1], device=codes.device)
        return super().forward(codes + depth * self.stride)


class ResidualTransformer(nn.Module):
    """A spatial transformer over positions, and a small one over the depths of a position.

    Args:
        config: positions, depths, codes and the size of both transformers.
        condition_length: vectors of the condition, L.
    """

    def __init__(self, config: "ResidualConfig", condition_length: int) -> None:
        super().__init__()
        width, depths, codes, dropout = config.width, config.books, config.codebook_size, config.dropout
        self.cumulative = config.cumulative
        self.pos_emb_cond = nn.Parameter(torch.zeros(1, condition_length, width))
        self.pos_emb_hw = nn.Parameter(torch.zeros(1, config.positions, width))
        self.pos_emb_d = nn.Parameter(torch.zeros(1, depths, width))
        self.tok_emb: DepthEmbedding | None = None
        self.input_mlp: nn.Linear | None = None
        self.head_mlp: nn.Linear | None = None
        if config.codebook_dim == 0:
            self.tok_emb = DepthEmbedding(depths, codes, width, config.shared_tables)
        else:
            self.input_mlp = nn.Linear(config.codebook_dim, width)
            self.head_mlp = nn.Linear(config.codebook_dim, width)
        self.body_transformer = CausalTransformer(width, config.layers, config.heads, config.sigmoid_gelu, dropout)
        depth_heads = config.depth_heads or config.heads
        self.head_transformer = CausalTransformer(
            width, config.depth_layers, depth_heads, config.depth_sigmoid_gelu, dropout
        )
        self.classifier = Classifier(width, codes, None if config.shared_classifier else depths)

    def initialise(self) -> None:
        """Sets every initial value: normals of 0.02, zeros for biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | DepthLinear):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | DepthLinear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in (self.pos_emb_cond, self.pos_emb_hw, self.pos_emb_d):
            nn.init.normal_(position, std=0.02)

    def position_inputs(self, codes: Tensor, vectors: Tensor | None, first: int) -> Tensor:
        """Inputs of the body for positions from number `first` on: (B, n, C).

        Args:
            codes: int64 (B, n, D).
            vectors: their code vectors (B, n, D, codebook_dim); None with learned tables.
            first: the number of the first position.
        """
        embedded = self.tok_emb(codes) if self.tok_emb is not None else self.input_mlp(vectors)  # type: ignore[misc]
        return embedded.sum(2) + self.pos_emb_hw[:, first : first + codes.shape[1]]

    def depth_inputs(self, context: Tensor, codes: Tensor, vectors: Tensor | None) -> Tensor:
        """Inputs of the head: (N, 1 + n, C) for a position's context (N, C) and its first n codes (N, n)."""
        if self.tok_emb is not None:
            before = self.tok_emb(codes)  # (N, n, C)
            before = before.cumsum(1) if self.cumulative else before
        else:
            assert vectors is not None
            assert self.head_mlp is not None
            before = self.head_mlp(vectors.cumsum(1) if self.cumulative else vectors)
        x = torch.cat([context[:, None], before], 1)
        return x + self.pos_emb_d[:, : x.shape[1]]

    def body(
        self,
        codes: Tensor,
        vectors: Tensor | None,
        condition: Tensor,
        run: Callable[..., Any] = call,
        layers: int | None = None,
    ) -> Tensor:
        """The body's states (B, L + T - 1, C) after so many blocks; the last T are those that predict positions."""
        x = torch.cat([condition + self.pos_emb_cond, self.position_inputs(codes, vectors, 0)[:, :-1]], 1)
        return self.body_transformer(x, run=run, layers=layers)[0]

    def forward(
        self, codes: Tensor, vectors: Tensor | None, condition: Tensor, run: Callable[..., Any] = call
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, T, D, K) of codes (B, T, D), and the body's outputs under the condition (B, L - 1, C).

        Args:
            codes: int64 (B, T, D).
            vectors: their code vectors (B, T, D, codebook_dim); None with learned tables.
            condition: vectors (B, L, C), without positions.
        """
        x = self.body(codes, vectors, condition, run)  # (B, L + T - 1, C)
        length = condition.shape[1]
        context = x[:, length - 1 :].flatten(0, 1)  # (B T, C)
        last = None if vectors is None else vectors[:, :, :-1].flatten(0, 1)
        depth = self.depth_inputs(context, codes[:, :, :-1].flatten(0, 1), last)  # (B T, D, C)
        outputs, _ = self.head_transformer(depth, run=run)
        return self.classifier(outputs).unflatten(0, codes.shape[:2]), x[:, : length - 1]
