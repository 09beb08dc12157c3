"""Transformer over scales: every token of a scale at once, from all smaller scales (VAR, https://arxiv.org/abs/2404.02905)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.generators.blocks import MLP, call

if TYPE_CHECKING:
    from lexel.generators.next_scale.generator import NextScaleConfig

LARGEST_SCALE = 4.605170249938965  # log(100) in float32, as the published code has it

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block: (B, heads, tokens so far, width / heads)


class ScaleAttention(nn.Module):
    """Self-attention whose queries and keys may be unit vectors with a learned temperature a head."""

    scale_mul_1H11: nn.Parameter | None

    def __init__(self, width: int, num_heads: int, normalised: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1.0 if normalised else 0.25 / math.sqrt(width / num_heads)
        logarithms = torch.full((1, num_heads, 1, 1), math.log(4.0)) if normalised else None
        self.scale_mul_1H11 = None if logarithms is None else nn.Parameter(logarithms)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attended tokens (B, T, C), and keys and values of all tokens so far."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        split = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        if self.scale_mul_1H11 is not None:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(LARGEST_SCALE).exp()
            k = F.normalize(k, dim=-1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.proj(attended.transpose(1, 2).flatten(2)), k, v


class ScaleBlock(nn.Module):
    """A block that the condition modulates, by a layer of its own or by one that all blocks share."""

    ada_gss: nn.Parameter
    ada_lin: nn.Sequential

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, eps: float, normalised: bool, shared: bool
    ) -> None:
        super().__init__()
        self.shared = shared
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=eps)
        self.attn = ScaleAttention(width, num_heads, normalised)
        self.ffn = MLP(width, round(width * mlp_ratio), "tanh")
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width).div_(width**0.5))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, condition: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens (B, T, C), and keys and values. The condition is (B, C); (B, 1, 6, C) where its layer is shared."""
        parts = self.ada_gss + condition if self.shared else self.ada_lin(condition).unflatten(-1, (1, 6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = parts.unbind(2)  # (B, 1, C) each
        attended, keys, values = self.attn(self.norm(x) * (1 + scale1) + shift1, mask, past)
        x = x + gate1 * attended
        return x + gate2 * self.ffn(self.norm(x) * (1 + scale2) + shift2), (keys, values)


class ModulatedNorm(nn.Module):
    """The norm before the head, scaled and shifted by the condition."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=eps)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition)[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class ScaleTransformer(nn.Module):
    """Code vectors of the scales before (B, T - 1, D) and a condition (B, width) to logits (B, T, K).

    Args:
        config: scales, codes and the size of the transformer.
    """

    def __init__(self, config: "NextScaleConfig") -> None:
        super().__init__()
        width, shared = config.width, config.shared_modulation
        self.lengths = [side * side for side in config.scales]
        self.word_embed = nn.Linear(config.codebook_dim, width)
        self.pos_start = nn.Parameter(torch.zeros(1, self.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, sum(self.lengths), width))
        self.lvl_embed = nn.Embedding(len(config.scales), width)
        self.shared_ada_lin: nn.Module = nn.Identity()
        if shared:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.shared_modulation = shared
        sizes = (width, config.heads, config.mlp_ratio, config.norm_eps, config.normalised, shared)
        self.blocks = nn.ModuleList(ScaleBlock(*sizes) for _ in range(config.layers))
        self.head_nm = ModulatedNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.codebook_size)

    def initialise(self) -> None:
        """Sets every initial value, so that blocks and head start as nearly nothing."""
        width, blocks = self.word_embed.out_features, cast(list[ScaleBlock], list(self.blocks))
        deviation = math.sqrt(1 / width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=deviation)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            cast(nn.Linear, self.head_nm.ada_lin[1]).weight.mul_(0.5)
            for block in blocks:
                block.attn.proj.weight.div_(math.sqrt(2 * len(blocks)))
                block.ffn.fc2.weight.div_(math.sqrt(2 * len(blocks)))
                if block.shared:
                    block.ada_gss[:, :, 2:].mul_(0.5)
                    block.ada_gss[:, :, :2].mul_(1e-5)
                else:
                    modulation = cast(nn.Linear, block.ada_lin[1]).weight
                    modulation[2 * width :].mul_(0.5)
                    modulation[: 2 * width].mul_(1e-5)

    def levels(self, device: torch.device) -> Tensor:
        """The scale of every token, int64 (T,)."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(len(self.lengths), device=device).repeat_interleave(lengths, output_size=sum(self.lengths))

    def mask(self, device: torch.device) -> Tensor:
        """Which tokens may see which: a token sees its own scale and all smaller ones; bool (T, T)."""
        levels = self.levels(device)
        return levels[:, None] >= levels[None]

    def embed(self, vectors: Tensor, condition: Tensor, first: int, count: int) -> Tensor:
        """Inputs of the tokens from number `first` on: (B, count, C).

        Args:
            vectors: code vectors under tokens beyond the first scale, (B, n, D).
            condition: (B, C), the input of the first scale.
            first: number of the first token; 0 puts the condition before the vectors.
            count: how many tokens.
        """
        x = self.word_embed(vectors)
        if first == 0:
            start = condition[:, None] + self.pos_start  # (B, T1, C)
            x = torch.cat([start, x], 1)
        place = slice(first, first + count)
        return x + self.lvl_embed(self.levels(x.device)[place]) + self.pos_1LC[:, place]  # (B, count, C)

    def states(
        self,
        x: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        run: Callable[..., Any] = call,
        layers: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """States (B, T, C) after so many blocks, all of them by default, and the KV cache with them.

        Args:
            x: embedded tokens (B, T, C).
            condition: (B, C).
            mask: which tokens may see which; None lets all see all.
            cache: of the tokens before.
            run: calls a block: a place to recompute activations.
            layers: how many blocks.
        """
        modulation = condition
        if self.shared_modulation:
            modulation = self.shared_ada_lin(condition).unflatten(-1, (1, 6, -1))  # (B, 1, 6, C)
        grown = []
        for number, block in enumerate(self.blocks[:layers]):
            x, state = run(block, x, modulation, mask, None if cache is None else cache[number])
            grown.append(state)
        return x, grown

    def logits(self, states: Tensor, condition: Tensor) -> Tensor:
        """Logits (B, T, K) after all blocks' states (B, T, C)."""
        return self.head(self.head_nm(states, condition))

    def forward(self, vectors: Tensor, condition: Tensor, run: Callable[..., Any] = call) -> Tensor:
        x = self.embed(vectors, condition, 0, sum(self.lengths))
        return self.logits(self.states(x, condition, self.mask(x.device), run=run)[0], condition)
