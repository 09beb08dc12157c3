"""Residual quantization: each level quantizes what the levels before it left (RQ-VAE
https://arxiv.org/abs/2203.01941).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lexel.quantizers import bounds
from lexel.quantizers.base import GRADIENTS, Quantized, Quantizer, full_precision
from lexel.quantizers.stacked import Stacked, mean_terms
from lexel.runtime import at_least_float32


class Residual(Stacked):
    """A code is the sum of `depth` codes, chosen one after another: K^depth codes for the price of depth searches.

    Levels see the remaining latent with the chosen codes held constant, so each level's commitment term is the
    distance from the latent to the sum so far. Where the base passes the decoder's gradient by the codes, the sum
    does so once; bases with gradients of their own (ibq, soft, gumbel, fsq) add theirs.

    RQ-VAE itself is base "ema" with one shared book of 16,384 codes and restart_below = 1:

        Residual(16384, 256, depth=4, base="ema", shared=True, base_options={"restart_below": 1.0})

    Args:
        codebook_size: number of codes of one level, K.
        codebook_dim: length of a code, D.
        depth: number of levels, Q.
        base: the quantizer of a level, any simple one in QUANTIZERS.
        base_options: further options of the base.
        shared: whether all levels use the same quantizer.
        shrink: level q works on latents divided by shrink^q: for bases whose codes have a fixed size (0.5 suits
            "lfq"), where later levels must be finer.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        depth: int = 4,
        base: str = "vq",
        base_options: Mapping[str, Any] | None = None,
        shared: bool = False,
        shrink: float = 1.0,
    ) -> None:
        bounds.integer("depth", depth, 1, 256)
        bounds.number("shrink", shrink, 1e-6, 1e6)
        super().__init__(codebook_size, codebook_dim, base, base_options, [codebook_dim] * (1 if shared else depth))
        self.books = depth
        self.comparable_norms = False  # a latent is compared with a sum of codes
        self.shrink = shrink

    @property
    def codebook(self) -> Tensor:
        return torch.stack([level.codebook * self.shrink**q for q, level in enumerate(self)])

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return torch.stack(self.codes_of_levels(indices)).sum(0)

    def codes_of_levels(self, indices: Tensor) -> list[Tensor]:
        """The codes of each level, (B, D, *grid); their sum is the code. `prefixes` allows the first levels alone."""
        parts = zip(self, indices.unbind(1), strict=not self.prefixes)
        return [level.indices_to_codes(part) * self.shrink**q for q, (level, part) in enumerate(parts)]

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        indices = []
        for q, level in enumerate(self):
            indices.append(level.assign(z / self.shrink**q))
            z = z - level.indices_to_codes(indices[-1]) * self.shrink**q
        return torch.stack(indices, 1)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        results = self.levels_of(z)
        indices = torch.stack([result.indices for result in results], 1)
        if self.gradient in GRADIENTS and self.exact_in_training:
            z_q = GRADIENTS[self.gradient](z, self.indices_to_codes(indices))
        else:
            z_q = torch.stack([result.z_q * self.shrink**q for q, result in enumerate(results)]).sum(0)
            if self.gradient in GRADIENTS:
                z_q = GRADIENTS[self.gradient](z, z_q)
        return Quantized(z_q, indices, mean_terms([result.losses for result in results]))

    def levels_of(self, z: Tensor) -> list[Quantized]:
        """Each level's result on the rest that the levels before it left, in units of shrink^q."""
        results: list[Quantized] = []
        left = z
        for q, level in enumerate(self):
            results.append(level(left / self.shrink**q))
            left = left - results[-1].z_q.detach() * self.shrink**q
        return results

    def soft_targets(self, z: Tensor, temperature: float = 0.5) -> Tensor:
        """softmax(-|rest - code|^2 / temperature) at each level along the chosen codes, as RQ-Transformer learns from.

        Args:
            z: latents (B, D, *grid).
            temperature: 0.5 is the published one.

        Returns:
            (B, Q, *grid, K), in float32 at least: as many numbers as latents times codes times levels.
        """
        bounds.temperature("temperature", temperature)
        targets, left = [], at_least_float32(z)
        with torch.no_grad():
            for q, level in enumerate(self):
                rows = (left / self.shrink**q).movedim(1, -1)
                codes = level.codebook.to(rows.dtype)
                distances = rows.square().sum(-1, keepdim=True) - 2 * rows @ codes.T + codes.square().sum(1)
                targets.append((-distances / temperature).softmax(-1))
                left = left - level.indices_to_codes(level.assign(left / self.shrink**q)) * self.shrink**q
        return torch.stack(targets, 1)

    def bake(self) -> Quantizer:
        tables = [level.bake() for level in self]
        baked = type(self)(self.codebook_size, self.codebook_dim, self.books, "table", shrink=self.shrink)
        baked.levels = nn.ModuleList(tables)
        baked.similarity = self.similarity
        return baked.eval()
