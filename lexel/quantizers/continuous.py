"""No quantization: latents pass as they are (for continuous-token models such as https://arxiv.org/abs/2406.11838)."""

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.quantizers.base import Quantized, Quantizer, full_precision

_NONE = "continuous latents have no codes; use a quantizer such as 'ibq' for indices, a table or a codebook"


class Continuous(Quantizer):
    """The identity, under the quantizers' contract: z_q is z, every index is 0, there are no loss terms.

    Built by the kind "none". Whatever needs codes (`codebook`, `assign`, `indices_to_codes`, `bake`) raises
    UsageError.

        Continuous(codebook_dim=16)(z).z_q is z

    Args:
        codebook_dim: channels of the latents, D.
    """

    gradient = "straight_through"
    straight_through = True
    stores_table = False
    code_tables = ()

    def __init__(self, codebook_dim: int) -> None:
        super().__init__(2, codebook_dim)
        self.codebook_size = 1  # one index, 0, so that histograms of indices stay defined

    @property
    def codebook(self) -> Tensor:
        raise UsageError(_NONE)

    def assign(self, z: Tensor) -> Tensor:
        raise UsageError(_NONE)

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        raise UsageError(_NONE)

    def latents_to_decode(self, z: Tensor) -> Tensor:
        """The latents (B, D, *grid) for a decoder in evaluation: all of them."""
        return z

    def bake(self) -> Quantizer:
        raise UsageError(_NONE)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        return Quantized(z, torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device), {})
