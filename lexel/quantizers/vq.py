"""Vector quantization: the nearest entry of a learned table (https://arxiv.org/abs/1711.00937)."""

import torch
from torch import Tensor, nn

from lexel.kernels import SIMILARITIES, Similarity
from lexel.quantizers.base import GRADIENTS, ONLY_CHOSEN_LEARN, Quantized, Quantizer, choose, full_precision, vq_terms


class VQ(Quantizer):
    """Picks the code at the smallest Euclidean distance; only chosen codes learn.

    The published VQGAN code swaps the two loss weights (0.25 on `codebook`, 1 on `commitment`); the defaults
    here are the paper's.

        quantizer = VQ(codebook_size=1024, codebook_dim=256)
        z_q, indices, losses = quantizer(torch.randn(2, 256, 16, 16))

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        gradient: how the decoder's gradient reaches the latents: "straight_through" or "rotation".
        similarity: how the nearest code is found, "l2", "dot" or "cosine"; z_q is the code at its own length.
        restart_below: codes that fewer latents a batch choose, on average, start again at latents; 0 is never.
        clustering: whether codes move towards their nearest latents in training, those the most that are chosen the
            least (https://arxiv.org/abs/2307.15139), as in TA-TiTok.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}
    straight_through = True
    advice = ONLY_CHOSEN_LEARN
    can_be_sharded = True

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        gradient: str = "straight_through",
        similarity: Similarity = "l2",
        restart_below: float = 0.0,
        clustering: bool = False,
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.similarity = choose("similarity", similarity, SIMILARITIES)
        self.gradient = choose("gradient", gradient, GRADIENTS)
        self.weight = nn.Parameter(torch.empty(codebook_size, codebook_dim).uniform_(-1, 1).div_(codebook_size))
        self.follow_use(restart_below)
        self.follow_clusters(clustering)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        self.restart_dead(z)
        indices = self.assign(z)
        self.count_chosen(z, indices)
        z_q = self.indices_to_codes(indices)
        self.cluster(z, indices)
        return Quantized(GRADIENTS[self.gradient](z, z_q), indices, vq_terms(z, z_q))
