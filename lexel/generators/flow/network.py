"""Diffusion transformer: patches of latents, time and condition by AdaLN (DiT, https://arxiv.org/abs/2212.09748)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lexel.generators.blocks import MLP, Attention, call
from lexel.generators.flow.diffusion import time_features
from lexel.runtime import on_meta

if TYPE_CHECKING:
    from lexel.generators.flow.generator import FlowConfig

TIME_WIDTH = 256


class TimeEmbedding(nn.Module):
    """Times (N,) as vectors (N, C): sinusoids through two linear layers.

    Args:
        width: C.
        features: number of sinusoids.
    """

    def __init__(self, width: int, features: int = TIME_WIDTH) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def initialise(self) -> None:
        """Normals of 0.02 for both matrices."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, time: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        exact = time.double() if dtype == torch.float64 else time
        return self.mlp(time_features(exact, self.features).to(dtype))  # (N, C)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shifts and scales the vectors of x by those of a condition."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block whose norms and residuals the condition modulates (AdaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (N, T, C) under a condition (N, 1, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)  # (N, 1, C) each
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, C)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, C)


class FinalLayer(nn.Module):
    """Vectors (..., C) to outputs (..., outputs), modulated by the condition."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbedding(nn.Module):
    """Patches of latents as tokens: (N, C, H, W) to (N, H W / p^2, width)."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class DiffusionTransformer(nn.Module):
    """Noised latents (N, C, H, W), times (N,) and conditions (N, width) to outputs (N, outputs, H, W).

    Args:
        config: sizes of latents, patches and transformer; with `learned_variance` there are two outputs for a channel.
    """

    pos_embed: Tensor

    def __init__(self, config: "FlowConfig") -> None:
        super().__init__()
        width, self.patch = config.width, config.patch
        self.patches = config.shape[0] // config.patch, config.shape[1] // config.patch  # rows and columns of them
        outputs = config.channels * (2 if config.learned_variance else 1)
        self.x_embedder = PatchEmbedding(config.channels, config.patch, width)
        self.t_embedder = TimeEmbedding(width)
        self.pos_embed = nn.Parameter(sinusoidal_positions(*self.patches, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.final_layer = FinalLayer(width, config.patch**2 * outputs)

    def initialise(self) -> None:
        """Sets every initial value: Xavier for linear layers, zeros where blocks and output must start as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(len(self.x_embedder.proj.weight), -1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        self.t_embedder.initialise()
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self,
        z: Tensor,
        time: Tensor,
        condition: Tensor,
        run: Callable[..., Tensor] = call,
    ) -> Tensor:
        """Outputs (N, outputs, H, W). `run` calls a block: a place to recompute activations."""
        modulation = self.modulation(time, condition)
        x = self.final_layer(self.states(z, modulation, run), modulation)  # (N, T, p * p * outputs)
        patches = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, self.patches)  # (N, r, c, p, q, outputs)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (N, outputs, H, W)

    def modulation(self, time: Tensor, condition: Tensor) -> Tensor:
        """What modulates every token, (N, 1, width): time (N,) and condition (N, width) added up."""
        return (self.t_embedder(time) + condition)[:, None]

    def states(
        self, z: Tensor, modulation: Tensor, run: Callable[..., Tensor] = call, layers: int | None = None
    ) -> Tensor:
        """States (N, T, width) after so many blocks, all by default."""
        x = self.x_embedder(z) + self.pos_embed.to(z.dtype)  # (N, T, width)
        for block in self.blocks[:layers]:
            x = run(block, x, modulation)
        return x


def sinusoidal_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of a grid, row by row: (1, rows * columns, width); columns first, then rows."""

    def table(positions: Tensor) -> Tensor:  # sines, then cosines
        frequencies = 1 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        angles = positions.double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    if on_meta():
        return torch.empty(1, rows * columns, 4 * (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([table(column.flatten()), table(row.flatten())], 1).float()[None]
