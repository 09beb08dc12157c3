"""Vector quantization whose codes are moving averages (https://arxiv.org/abs/1711.00937, appendix A.1), with
restart of dead codes (https://arxiv.org/abs/2003.02836).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.distributed import all_rows, all_sum
from lexel.kernels import nearest
from lexel.kernels.clustering import kmeans
from lexel.quantizers import bounds
from lexel.quantizers.base import GRADIENTS, Advice, Quantized, Quantizer, as_grid, as_vectors, choose, full_precision
from lexel.quantizers.living import Recoded, times_chosen
from lexel.quantizers.running import Recall, recomputing, statistics_move


class EMA(Quantizer):
    """Every code is the running mean of the latents that chose it; no gradient reaches the table.

    In training, in this order: dead codes are restarted, latents choose, the averages move (with counts and sums
    of all processes), codes are looked up. So z_q is always what the indices name. Published code looks codes up
    before it moves them; the difference is one step of 1 - decay.

        EMA(codebook_size=1024, codebook_dim=64, start="kmeans", restart_below=1.0)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        decay: of the averages; 0.99 is the paper's.
        epsilon: of the Laplace smoothing of the counts.
        start: "normal", N(0, 1), or "kmeans", 10 iterations on the first training batch.
        restart_below: a code whose average count per batch is below this becomes a random latent of the batch,
            before latents choose; 0 is off. RQ-VAE uses 1; with fewer latents in a batch than codes, stay below
            their ratio.
        gradient: "straight_through" or "rotation".
        order: "move_first", as above; "look_up_first", as released: z_q is the code before it moves, and dead codes
            are restarted after the averages have moved. z_q is then not what the indices name until evaluation.
    """

    LOSS_WEIGHTS = {"commitment": 0.25}
    straight_through = True
    batch_dependent = True
    code_tables = ("weight", "counts", "sums")
    advice = Advice(
        "codes move only when latents choose them",
        "restart dead codes (restart_below), or start the codes from the data's own latents",
    )

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        start: str = "normal",
        restart_below: float = 0.0,
        gradient: str = "straight_through",
        order: Literal["move_first", "look_up_first"] = "move_first",
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.decay = bounds.decay(decay)
        self.epsilon = bounds.number("epsilon", epsilon, 0, 1)
        self.start = choose("start", start, ("normal", "kmeans"))
        self.restart_below = bounds.number("restart_below", restart_below, 0)
        self.look_up_first = choose("order", order, ("move_first", "look_up_first")) == "look_up_first"
        self.exact_in_training = not self.look_up_first
        self.gradient = choose("gradient", gradient, GRADIENTS)
        self._recall = Recall()
        self.weight = nn.Buffer(torch.randn(codebook_size, codebook_dim))
        self.counts = nn.Buffer(torch.ones(codebook_size))  # average number of latents per batch
        self.sums = nn.Buffer(self.weight.clone())  # average sum of those latents
        self.steps = nn.Buffer(torch.zeros((), dtype=torch.int64))  # training batches seen

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        indices, codes = self._quantize(as_vectors(z.detach()))
        indices, z_q = indices.view(z.shape[0], *z.shape[2:]), as_grid(codes, z)
        return Quantized(GRADIENTS[self.gradient](z, z_q), indices, {"commitment": F.mse_loss(z, z_q)})

    def _quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The indices (N,) and codes (N, D) of latents (N, D); in training the averages move in between."""
        if self.training and statistics_move(vectors):
            indices, codes = self._learn(vectors)
            self._recall.keep(vectors, indices, codes)
            return indices, codes
        if self.training and recomputing() and (found := self._recall.find(vectors)) is not None:
            return found[0], found[1]
        indices = nearest(vectors, self.weight)
        return indices, F.embedding(indices, self.weight)

    @torch.no_grad()
    def _learn(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the averages on latents (N, D); the indices (N,) they chose, and their codes (N, D)."""
        vectors = vectors.to(self.weight.dtype)
        if self.start == "kmeans" and self.steps == 0:
            centres, members = kmeans(all_rows(vectors), self.codebook_size)
            self.place(members >= 0, centres, members.clamp_min(1))
        elif self.restart_below > 0 and not self.look_up_first:
            self._restart(vectors, int(self.steps))
        self.steps.add_(1)

        indices = nearest(vectors, self.weight)
        codes = F.embedding(indices, self.weight)
        self.counts.lerp_(times_chosen(indices, self.counts), 1 - self.decay)
        self.sums.lerp_(all_sum(torch.zeros_like(self.sums).index_add_(0, indices, vectors)), 1 - self.decay)
        if self.restart_below > 0 and self.look_up_first:
            self._restart(vectors, int(self.steps))
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        self.weight.copy_(self.sums / smoothed[:, None])
        return indices, codes if self.look_up_first else F.embedding(indices, self.weight)

    def place(self, which: Tensor, codes: Tensor, counts: Tensor) -> None:
        super().place(which, codes, counts)
        self.sums[which] = codes * counts[:, None]

    def grow(self, table: Mapping[str, Any], parents: Tensor, codes: Tensor) -> Recoded:
        recoded = super().grow(table, parents, codes)
        state = recoded.state
        state["sums"] = state["weight"] * state["counts"][:, None]
        return recoded
