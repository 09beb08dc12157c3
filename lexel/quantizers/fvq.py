"""FVQ: a table behind VQBridge, a small network that mixes all codes (https://arxiv.org/abs/2509.10140)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.base import choose
from lexel.quantizers.projected import ProjectedVQ

HEADS = 4  # of the attention in the bridge


class FVQ(ProjectedVQ):
    """Plain vector quantization on a bridged table: every code gets a gradient through the bridge.

    In training the bridge runs once a step; in evaluation once, and `bake` drops it. The other half of the paper,
    learning annealing, is a learning-rate schedule of the training loop (warm-up, constant, linear to 1 %).

        FVQ(codebook_size=16384, codebook_dim=256)  # the paper's L/4 bridge; from 65,536 codes on it is L/8

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        bridge: "vit" (VQBridge), or the ablation's "linear" (one layer) and "mlp" (five with ReLU).
        patch: side of the squares of codes that VQBridge compresses into a token; None is 4, and 8 from 65,536
            codes on, or the largest smaller power of two that fits.
        width: of VQBridge; 32, 64, 128, 256, 512 are the paper's XS, S, B, L, XL. A multiple of 4, its heads.
        depth: VQBridge's blocks.
        start: "zero" as published: VQBridge's last layer is 0, and so is every code until codes that were chosen
            have moved (one slot of the patches each step at first); "residual" adds the table to the bridge's
            output, so that codes start as the table.
        gradient: "straight_through" or "rotation".
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        bridge: str = "vit",
        patch: int | None = None,
        width: int = 256,
        depth: int = 2,
        start: str = "zero",
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, gradient)
        self.starts_collapsed = bridge == "vit" and start == "zero"
        self.residual = choose("start", start, ("zero", "residual")) == "residual"
        self.weight = nn.Parameter(torch.empty(codebook_size, codebook_dim).uniform_(-1, 1).div_(codebook_size))
        self.bridge: nn.Module
        if choose("bridge", bridge, ("vit", "linear", "mlp")) == "vit":
            self.bridge = VQBridge(codebook_size, codebook_dim, patch, width, depth)
        else:
            layers: list[nn.Module] = [nn.Linear(codebook_dim, codebook_dim)]
            for _ in range(4 if bridge == "mlp" else 0):
                layers += [nn.ReLU(), nn.Linear(codebook_dim, codebook_dim)]
            self.bridge = nn.Sequential(*layers)

    def project(self) -> Tensor:
        bridged = self.bridge(self.weight)
        return self.weight + bridged if self.residual else bridged


class VQBridge(nn.Module):
    """Compress, process, recover: a table (K, D) as a picture of codes through a small transformer, (K, D).

    Code i stands at row i // columns and column i % columns. Squares of patch x patch codes become tokens, which
    attend to each other without positions, and each gives its square back. There is no path around it.

    Args:
        codebook_size: K; its picture is the most nearly square one whose sides patch divides.
        codebook_dim: D.
        patch: side of a square; None as in FVQ.
        width: of a token, a multiple of 4.
        depth: number of transformer blocks.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, patch: int | None, width: int, depth: int) -> None:
        super().__init__()
        bounds.integer("width", width, 1, 2**14)
        bounds.integer("depth", depth, 0, 64)
        if width % HEADS:
            raise UsageError(f"width must be a multiple of the {HEADS} heads, got {width}")
        if patch is None:
            largest = 4 if codebook_size < 65536 else 8
            patch = next(p for p in (8, 4, 2, 1) if p <= largest and codebook_size % (p * p) == 0)
        bounds.integer("patch", patch, 1, 2**10)
        if codebook_size % (patch * patch):
            raise UsageError(f"squares of {patch} x {patch} codes do not tile {codebook_size} codes; try patch=1")
        squares = codebook_size // patch**2
        rows = next(r for r in range(math.isqrt(squares), 0, -1) if squares % r == 0)
        self.shape = (rows, patch, squares // rows, patch)  # (rows, within, columns, within)
        self.compress = nn.Linear(patch * patch * codebook_dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.recover = nn.Linear(width, patch * patch * codebook_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.recover.weight)

    def forward(self, table: Tensor) -> Tensor:
        rows, patch, columns, _ = self.shape
        squares = table.view(*self.shape, -1).transpose(1, 2)  # (rows, columns, patch, patch, D)
        tokens = self.compress(squares.flatten(2)).flatten(0, 1)  # (squares, width)
        for block in self.blocks:
            tokens = block(tokens)
        recovered = self.recover(self.norm(tokens)).view(rows, columns, patch, patch, -1)
        return recovered.transpose(1, 2).reshape(table.shape)


class _Block(nn.Module):
    """A pre-norm transformer block over tokens (T, width): 4 heads, MLP twice as wide, tanh GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = (
            self.qkv(self.norm1(tokens)).view(len(tokens), 3, HEADS, -1).permute(1, 2, 0, 3)
        )  # (3, heads, T, width / 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        tokens = tokens + self.out(attended.transpose(0, 1).flatten(1))
        return tokens + self.narrow(F.gelu(self.widen(self.norm2(tokens)), approximate="tanh"))
