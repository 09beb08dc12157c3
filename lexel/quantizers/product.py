"""Product quantization: parts of a latent have books of their own (https://hal.inria.fr/inria-00514462; in
tokenizers, UniTok https://arxiv.org/abs/2502.20321).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.base import Quantized, Quantizer, full_precision
from lexel.quantizers.stacked import Stacked, mean_terms


class Product(Stacked):
    """Splits the channels into `parts`, each quantized by itself: K^parts codes from parts small books.

    `codebook` (Q, K, D) holds each part's codes in that part's channels and 0 in the others.

        Product(codebook_size=4096, codebook_dim=64, parts=8, base="cosine")

    Args:
        codebook_size: number of codes of one part, K.
        codebook_dim: channels of the latents, D; the first D mod parts parts have one channel more.
        parts: Q, at most D; None is 2, or 1 for a single channel.
        base: the quantizer of a part, any simple one in QUANTIZERS.
        base_options: further options of the base.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        parts: int | None = None,
        base: str = "vq",
        base_options: Mapping[str, Any] | None = None,
    ) -> None:
        bounds.integer("codebook_dim", codebook_dim, 1, 2**16)
        parts = min(2, codebook_dim) if parts is None else bounds.integer("parts", parts, 1, 1024)
        if parts > codebook_dim:
            raise UsageError(f"parts must be from 1 to codebook_dim {codebook_dim}, got {parts}")
        dims = [codebook_dim // parts + (q < codebook_dim % parts) for q in range(parts)]
        super().__init__(codebook_size, codebook_dim, base, base_options, dims)
        self.dims = dims

    @property
    def codebook(self) -> Tensor:
        before = [sum(self.dims[:q]) for q in range(self.books)]
        padded = [
            F.pad(level.codebook, (start, self.codebook_dim - start - level.codebook_dim))
            for start, level in zip(before, self, strict=True)
        ]
        return torch.stack(padded)

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        parts = zip(self, indices.unbind(1), strict=True)
        return torch.cat([level.indices_to_codes(part) for level, part in parts], 1)

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        parts = zip(self, z.split(self.dims, 1), strict=True)
        return torch.stack([level.assign(part) for level, part in parts], 1)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        results = [level(part) for level, part in zip(self, z.split(self.dims, 1), strict=True)]
        return Quantized(
            torch.cat([result.z_q for result in results], 1),
            torch.stack([result.indices for result in results], 1),
            mean_terms([result.losses for result in results]),
        )

    def bake(self) -> Quantizer:
        tables = [level.bake() for level in self]
        baked = Product(self.codebook_size, self.codebook_dim, self.books, "table")
        baked.levels = nn.ModuleList(tables)
        baked.similarity = self.similarity
        return baked.eval()
