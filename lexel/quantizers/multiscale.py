"""Multi-scale residual quantization: a grid is coded coarse to fine, each scale on what the coarser ones left
(VAR https://arxiv.org/abs/2404.02905).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.base import GRADIENTS, Advice, Quantized, Quantizer, full_precision
from lexel.quantizers.living import Recoded
from lexel.quantizers.stacked import around_base, build_base

PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the scales of a 16 x 16 grid
LARGEST_SIDE = 4096  # of a grid that is looked for from a number of tokens


class Multiscale(Quantizer):
    """A code of the grid at every scale, from one shared codebook: indices (B, T), coarse to fine.

    At each scale the rest is averaged down to the scale's grid (area), quantized, enlarged to the full grid (bicubic),
    smoothed by (1 - r) h + r conv(h), and subtracted from the rest. z_q is the sum. A scale of side p has
    round(p / P) of the grid's rows and columns, P being the last side, so that grids of any size and shape have all
    scales. Axes before the last two (frames) are quantized each by itself. One row of tokens does not tell its grid:
    it is taken for the one that was quantized here to so many tokens, or else for a square one; methods take `grid`.

    Any simple quantizer can be the base. Terms, as means over scales: `codebook` and `commitment` between the latents
    and the sum so far; `quantization` likewise where the base has it; the base's other terms as they are. Where the
    base passes the decoder's gradient by the codes, the sum does so once; bases with gradients of their own (ibq, soft,
    gumbel, fsq) keep them.

        var = Multiscale(codebook_size=4096, codebook_dim=32)  # 680 tokens for a 16 x 16 grid
        ibq = Multiscale(codebook_size=16384, codebook_dim=32, base="ibq")

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        scales: sides of the scales, ascending; the last stands for the whole grid. None: 1 2 3 4 5 6 8 10 13 16.
        base: the quantizer of every scale, any simple one in QUANTIZERS; published "vq" ({"similarity": "cosine"} is
            the released `using_znorm`).
        base_options: further options of the base.
        smoothing: r, from 0 to 1; 0.5 is published.
        smoothers: how many convolutions the scales share, from coarse to fine; None is one a scale.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}
    stores_table = False  # the base does
    why_fixed = "its codes see what coarser scales leave, not the latents"

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        scales: Sequence[int] | None = None,
        base: str = "vq",
        base_options: Mapping[str, Any] | None = None,
        smoothing: float = 0.5,
        smoothers: int | None = 4,
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.scales = tuple(PUBLISHED if scales is None else scales)
        for side in self.scales:
            bounds.integer("a side in scales", side, 1, 1024)
        if not self.scales or list(self.scales) != sorted(set(self.scales)):
            raise UsageError(f"scales must be ascending sides such as [1, 2, 4, 8], got {list(self.scales)}")
        self.smoothing = bounds.number("smoothing", smoothing, 0, 1)
        count = len(self.scales) if smoothers is None else bounds.integer("smoothers", smoothers, 1, 64)
        self.base_table = {"kind": base, **(base_options or {})}
        self.base = build_base(base, codebook_size, codebook_dim, base_options)
        self.smoothers = nn.ModuleList(_Smoother(codebook_dim) for _ in range(count))
        self._grids: dict[int, set[tuple[int, ...]]] = {}  # what has been quantized, by its number of tokens
        self.smoother_of_scale = _spread(len(self.scales), count)
        self.take_after(self.base)
        self.LOSS_WEIGHTS = {**Multiscale.LOSS_WEIGHTS, **self.base.LOSS_WEIGHTS}
        self.comparable_norms = False  # a latent is compared with a sum of codes

    @property
    def codebook(self) -> Tensor:
        return self.base.codebook

    def token_grids(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The grid of each scale, coarse to fine, of latents (D, *grid): ((1, 1), (2, 2), ...)."""
        *frames, height, width = (1, 1, *grid)[-max(2, len(grid)) :]
        last = self.scales[-1]
        return tuple(
            (*frames, max(1, math.floor(height * side / last + 0.5)), max(1, math.floor(width * side / last + 0.5)))
            for side in self.scales
        )

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return (sum(math.prod(scale) for scale in self.token_grids(grid)),)

    def latent_grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The grid of T tokens: the one that this quantizer has quantized to so many, or else the square one.

        Raises:
            UsageError: there is none, or several grids quantized here have that number of tokens.
        """
        tokens = shape[0] if len(shape) == 1 else -1
        seen = self._grids.get(tokens, set())
        if len(seen) > 1:
            raise UsageError(f"{tokens} tokens are those of grids {', '.join(map(str, sorted(seen)))}; name the grid")
        if seen:
            return next(iter(seen))
        for side in range(1, LARGEST_SIDE):
            count = self.index_shape((side, side))[0]
            if count == tokens:
                return (side, side)
            if count > tokens:
                break
        raise UsageError(
            f"indices (B, {', '.join(map(str, shape))}) are those of no square grid at scales {list(self.scales)}; "
            "name the grid"
        )

    def prune(self, table: Mapping[str, Any], kept: Tensor) -> Recoded:
        return around_base(self, table, {"base": self.base.prune(self.base_table, kept)}, len(kept))

    def anneal(self, progress: float) -> None:
        self.base.anneal(progress)

    def dead_codes(self, seen: Mapping[str, float]) -> Advice:
        return self.base.dead_codes(seen)

    def bake(self) -> Quantizer:
        table = self.base.bake()
        count = len(self.smoothers)
        options = (self.codebook_size, self.codebook_dim, self.scales, "table", None, self.smoothing, count)
        baked = Multiscale(*options)
        baked.base, baked.similarity = table, table.similarity
        baked.smoothers = nn.ModuleList(_frozen(smoother) for smoother in self.smoothers)
        return baked.eval()

    def searcher(self) -> nn.Module:
        raise UsageError("Multiscale, with tokens of several scales, cannot be exported")

    # ---------------------------------------------------------------------- scale by scale, for generators

    def split(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> list[Tensor]:
        """Indices (B, T) as those of each scale, coarse to fine: (B, *scale).

        Args:
            indices: of a latent grid.
            grid: that grid; None is the square one of T tokens.
        """
        grids = self.token_grids(self.latent_grid(tuple(indices.shape[1:])) if grid is None else grid)
        parts = indices.split([math.prod(scale) for scale in grids], 1)
        return [part.view(len(part), *scale) for part, scale in zip(parts, grids, strict=True)]

    def refine(self, z_q: Tensor, scale: int, indices: Tensor) -> Tensor:
        """z_q (B, D, h, w), the sum of the coarser scales, and this scale's indices (B, *scale): the sum with it."""
        return z_q + self._enlarge(self.base.indices_to_codes(indices).to(z_q.dtype), scale, z_q.shape[2:])

    def preview(self, z_q: Tensor, scale: int) -> Tensor:
        """z_q (B, D, h, w) averaged down to the grid of a scale: what a generator sees before it predicts that one."""
        return _reduce(z_q, self.token_grids(tuple(z_q.shape[2:]))[scale])

    def partial_sums(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> list[Tensor]:
        """z_q after each scale, coarse to fine: (B, D, h, w) each; `grid` as in `split`."""
        grid = self.latent_grid(tuple(indices.shape[1:])) if grid is None else grid
        codes = self.codebook
        dtype = torch.promote_types(codes.dtype, torch.float32)
        z_q = codes.new_zeros((len(indices), self.codebook_dim, *grid), dtype=dtype)
        sums = []
        for scale, part in enumerate(self.split(indices, grid)):
            z_q = self.refine(z_q, scale, part)
            sums.append(z_q)
        return sums

    def next_inputs(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Inputs of a next-scale generator in training: for every scale but the first the preview of the sum before.

        Args:
            indices: (B, T).
            grid: as in `split`.

        Returns:
            (B, T - the first scale's tokens, D), coarse to fine.
        """
        sums = self.partial_sums(indices, grid)[:-1]
        return torch.cat([self.preview(z_q, scale + 1).flatten(2) for scale, z_q in enumerate(sums)], 2).transpose(1, 2)

    # ---------------------------------------------------------------------- the contract

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """The sums (B, D, *grid) that indices (B, T) name; `grid` as in `split`."""
        grid = self.latent_grid(tuple(indices.shape[1:])) if grid is None else grid
        folded = _Folded(grid, len(indices))
        # (B, *frames, h, w) of each scale as (B', h w)
        flat = torch.cat([part.flatten(0, -3).flatten(1) for part in self.split(indices, grid)], 1)
        return folded.unfold(self.partial_sums(flat, folded.grid)[-1])

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        folded = self._folded(z)
        rest = folded.fold(z)
        indices = []
        for scale, grid in enumerate(self.token_grids(folded.grid)):
            indices.append(self.base.assign(_reduce(rest, grid)))
            codes = self.base.indices_to_codes(indices[-1]).to(rest.dtype)
            rest = rest - self._enlarge(codes, scale, rest.shape[2:])
        return folded.flat(indices)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        folded = self._folded(z)
        latents = folded.fold(z)
        rest, own, total = latents, torch.zeros_like(latents), torch.zeros_like(latents)
        indices, terms = [], []
        for scale, grid in enumerate(self.token_grids(folded.grid)):
            result = self.base(_reduce(rest, grid))
            indices.append(result.indices)
            step = self._enlarge(result.z_q.to(latents.dtype), scale, rest.shape[2:])
            codes = self.base.indices_to_codes(result.indices).to(latents.dtype)
            own, total = own + step, total + self._enlarge(codes, scale, rest.shape[2:])
            rest = rest - step.detach()
            losses = dict(result.losses)
            losses["codebook"] = F.mse_loss(total, latents.detach())  # moves codes and smoothers
            losses["commitment"] = F.mse_loss(latents, total.detach())
            if "quantization" in losses:
                losses["quantization"] = F.mse_loss(own, latents)
            terms.append(losses)
        flat = folded.flat(indices)
        if not self.exact_in_training:
            total = own
        elif self.base.batch_dependent:  # running statistics have moved since the first scales
            total = folded.fold(self.indices_to_codes(flat, tuple(z.shape[2:])).to(z.dtype))
        if self.gradient in GRADIENTS:
            z_q = GRADIENTS[self.gradient](latents, total)
        elif self.base.batch_dependent:
            z_q = total.detach() + (own - own.detach())
        else:
            z_q = own
        means = {name: torch.stack([losses[name] for losses in terms]).mean() for name in terms[0]}
        return Quantized(folded.unfold(z_q), flat, means)

    def _folded(self, z: Tensor) -> "_Folded":
        grid = tuple(z.shape[2:])
        self._grids.setdefault(self.index_shape(grid)[0], set()).add(grid)
        return _Folded(grid, len(z))

    def _enlarge(self, codes: Tensor, scale: int, grid: Sequence[int]) -> Tensor:
        """Codes (B, D, *scale) on the full grid, smoothed: (B, D, h, w)."""
        if tuple(codes.shape[2:]) != tuple(grid):
            codes = F.interpolate(codes, size=tuple(grid), mode="bicubic")
        smooth = self.smoothers[self.smoother_of_scale[scale]](codes)
        return (1 - self.smoothing) * codes + self.smoothing * smooth


class _Smoother(nn.Module):
    """A 3 x 3 convolution over channels that keeps the grid, in the precision of its input."""

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        start = nn.Conv2d(channels, channels, 3)
        self.weight, self.bias = start.weight, start.get_parameter("bias")

    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.weight.to(h.dtype), self.bias.to(h.dtype), padding=1)


def _frozen(module: nn.Module) -> nn.Module:
    """A copy that learns no more: its parameters are buffers."""
    copied = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        delattr(copied, name)
        copied.register_buffer(name, parameter.detach().clone())
    return copied


class _Folded:
    """Latents of any number of grid axes as (B', D, h, w): frames join the batch, missing axes have length 1."""

    def __init__(self, grid: tuple[int, ...], batch: int) -> None:
        self.full = grid
        self.grid = (1, 1, *grid)[-2:]
        self.batch = batch

    def fold(self, z: Tensor) -> Tensor:
        frames = z.view(*z.shape[:2], -1, *self.grid).transpose(1, 2)  # (B, frames, D, h, w)
        return frames.flatten(0, 1)

    def unfold(self, z: Tensor) -> Tensor:
        frames = z.view(self.batch, math.prod(self.full[:-2]), *z.shape[1:]).transpose(1, 2)
        return frames.reshape(self.batch, z.shape[1], *self.full)

    def flat(self, indices: list[Tensor]) -> Tensor:
        """Indices (B', *scale) of each scale as (B, T)."""
        return torch.cat([part.reshape(self.batch, -1) for part in indices], 1)


def _reduce(rest: Tensor, grid: Sequence[int]) -> Tensor:
    return rest if tuple(rest.shape[2:]) == tuple(grid) else F.interpolate(rest, size=tuple(grid), mode="area")


def _spread(scales: int, smoothers: int) -> list[int]:
    """Which smoother serves each scale: the nearest of evenly spread positions, the earlier one of two."""
    if smoothers == 1:
        return [0] * scales
    margin = 1 / 3 / smoothers if smoothers == 4 else 1 / 2 / smoothers  # as released, to the rounding of a tie
    step = (1 - margin - margin) / (smoothers - 1)
    ticks = [margin + i * step for i in range(smoothers)]
    positions = [scale / max(1, scales - 1) for scale in range(scales)]
    return [min(range(smoothers), key=lambda i: abs(ticks[i] - position)) for position in positions]
