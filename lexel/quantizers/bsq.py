"""Binary spherical quantization: signs on the unit sphere (https://arxiv.org/abs/2406.07548)."""

import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError
from lexel.quantizers.base import Quantizer, straight_through
from lexel.quantizers.lfq import LFQ
from lexel.quantizers.statistics import Statistics


class BSQ(LFQ):
    """Latents are put on the unit sphere, codes are its 2^D corners of the cube, (±1, ..., ±1) / sqrt(D).

    So the error is bounded, and the entropies use p(code) = softmax(2 z.c / temperature) with normalised z. The
    sample entropy is exact; the batch entropy is summed over groups of bits, which does not see correlations
    between groups. The commitment term is summed over channels. The decoder's gradient passes the signs by and is
    then divided by sqrt(D), as in the released code. Channels beyond or below log2 K work as in LFQ; below it codes
    leave the sphere.

        BSQ(codebook_size=2**18, codebook_dim=18)

    Args:
        codebook_size: number of codes, K, a power of two.
        codebook_dim: length of a code, D; log2 K is the published choice.
        temperature: of the entropies' softmax; 1 in the released recipes.
        bit_order: "high_first" (channel 0 is the highest bit, the released code's) or "low_first".
        group_bits: bits in a group of the batch entropy; 9 is the released class's, its recipes use 1.
        epsilon: inside the logarithm of the batch entropy.
        gradient: "straight_through" or "rotation".
        statistics: the images over which a batch entropy is taken, as in LFQ; "process" is the released code's.
    """

    LOSS_WEIGHTS = {"commitment": 0.0, "entropy_sample": 0.1, "entropy_batch": -0.1}

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        temperature: float = 1.0,
        bit_order: str = "high_first",
        group_bits: int | None = 9,
        epsilon: float = 1e-8,
        gradient: str = "straight_through",
        statistics: Statistics = "process",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, temperature, bit_order, group_bits, epsilon, gradient, statistics)
        self.scale = codebook_dim**-0.5

    def _prepare(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)

    def _commitment(self, z: Tensor, z_q: Tensor) -> Tensor:
        return F.mse_loss(z, z_q) * self.codebook_dim  # summed over channels, as released

    def _pass_gradient(self, z: Tensor, z_q: Tensor) -> Tensor:
        if self.gradient == "straight_through":  # past the signs, which are scaled afterwards
            return straight_through(self.scale * z, z_q)
        return super()._pass_gradient(z, z_q)

    def bake(self) -> Quantizer:
        if max(self.lattice.sizes) > 2:
            raise UsageError(
                f"BSQ with {self.codebook_size} codes in {self.codebook_dim} channels has several bits a channel, "
                "which no search over unnormalised latents finds; give it at least log2 K channels to bake it"
            )
        return super().bake()
