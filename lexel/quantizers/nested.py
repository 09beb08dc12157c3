"""Nested dropout over the levels of residual codes, so that every prefix of them decodes
(https://arxiv.org/abs/1402.0915; over residual levels in SoundStream https://arxiv.org/abs/2107.03312).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.nested_dropout import Keep, NestedDropout
from lexel.quantizers import bounds
from lexel.quantizers.base import GRADIENTS, Quantized, full_precision
from lexel.quantizers.residual import Residual
from lexel.quantizers.stacked import mean_terms


class Nested(Residual):
    """Residual quantization whose decoder sees, in training, only the first levels of each image.

    How many are kept is drawn for every image. Levels that are left out still choose, and learn, what the ones before
    them left, so indices always have all levels; in evaluation all are kept. `indices_to_codes` takes the first levels
    alone: (B, q, *grid) with q up to `depth`.

        nested = Nested(codebook_size=1024, codebook_dim=16, depth=8)
        coarse = nested.indices_to_codes(nested.assign(z)[:, :2])

    Args:
        codebook_size: number of codes of one level, K.
        codebook_dim: length of a code, D.
        depth: number of levels, Q.
        base: the quantizer of a level, any simple one in QUANTIZERS.
        base_options: further options of the base.
        shared: whether all levels use the same quantizer.
        shrink: as in Residual.
        keep: "uniform", any number of levels from `least` is as likely; "powers", any power of two and `depth`;
            "rounded", a uniform number is rounded up to a power of two (at most `depth`), as in FlexTok.
        full: the probability that all levels are kept, before any other is drawn.
        least: the smallest number of levels kept.
    """

    batch_dependent = True  # on chance
    prefixes = True
    exact_in_training = False

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        depth: int = 4,
        base: str = "vq",
        base_options: Mapping[str, Any] | None = None,
        shared: bool = False,
        shrink: float = 1.0,
        keep: Keep = "uniform",
        full: float = 0.0,
        least: int = 1,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, depth, base, base_options, shared, shrink)
        self.batch_dependent = True
        self.exact_in_training = False
        bounds.number("full", full, 0, 1)
        bounds.integer("least", least, 1, depth)
        self.dropout = NestedDropout(depth, keep, full, least)

    @property
    def prefix_lengths(self) -> list[int]:
        """The numbers of levels that training may keep, each as likely."""
        return self.dropout.lengths

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        if not 1 <= indices.shape[1] <= self.books:
            raise UsageError(f"indices must have 1 to {self.books} levels, got {tuple(indices.shape)}")
        return super().indices_to_codes(indices)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        if not self.training:
            return super().forward(z)
        results = self.levels_of(z)
        indices = torch.stack([result.indices for result in results], 1)
        kept = self.dropout.draw(len(z), z.device).view(-1, *[1] * (z.dim() - 1))  # (B, 1, *1)
        skips = self.gradient in GRADIENTS  # the decoder's gradient reaches no code
        own = self.codes_of_levels(indices) if skips else [r.z_q * self.shrink**q for q, r in enumerate(results)]
        z_q = torch.stack([part.where(q < kept, torch.zeros_like(part)) for q, part in enumerate(own)]).sum(0)
        if skips:
            z_q = GRADIENTS[self.gradient](z, z_q)
        return Quantized(z_q, indices, mean_terms([result.losses for result in results]))
