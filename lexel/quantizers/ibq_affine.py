"""Index backpropagation (https://arxiv.org/abs/2412.02692) on a table that follows the latents, without a temperature
to choose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.distributed import all_sum
from lexel.kernels import index_backpropagation, nearest
from lexel.quantizers import bounds
from lexel.quantizers.affine import FLOOR, Affine
from lexel.quantizers.base import Quantized, as_grid, as_vectors, choose, vq_terms

ERROR_DECAY = 0.9  # of the running squared error: it falls by half within some steps at the start


class IBQAffine(Affine):
    """The codes of `Affine`, which follow the latents' mean and covariance, with the gradients of IBQ.

    Logits are -|z - e|^2 / (2 s^2), where s^2 is the running mean of the squared distance between a latent and its
    code in one of the directions that the latents have; s is rounded to a power of two, which changes no index. At this
    width a latent's softmax holds the codes around it at any size, dimension and scale. Where codes are dense its
    covariance is s^2 in each direction, so that index backpropagation hands the latents the decoder's gradient at its
    own length, without a temperature. Directions in which codes do not differ get nothing through the softmax;
    therefore a share of the gradient, `identity`, comes as it is. The codes learn from the decoder, the chosen one
    directly and those around it through the softmax.

    The terms are those of plain VQ. Commitment weighs 0.05: at 0.25 the latents give up directions that the picture
    needs (evidence: docs/studies/which-quantizer.md).

        quantizer = IBQAffine(codebook_size=16384, codebook_dim=32)
        z_q, indices, losses = quantizer(torch.randn(2, 32, 16, 16))

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        decay: of the running mean and covariance.
        identity: the share of the decoder's gradient that reaches the latents as it is, as plain straight-through has
            it; the rest goes through the softmax. 0 is index backpropagation alone, 1 leaves the softmax out.
        mixing: "latents", the share `identity` of each picture's latents gets the gradient as it is and the others, in
            turn, that of the softmax; "blend", every latent gets both in these shares: the same on the mean, for
            1 / (1 - identity) times the softmax's cost. Grids of fewer places than that are always blended.
        rows: how many latents the backward pass takes at a time, as in `IBQ`.
        restart_below: codes that fewer latents a batch choose, on average, start again at latents; 0 is never.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.05}
    straight_through = False

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.99,
        identity: float = 0.75,
        mixing: str = "latents",
        rows: int | None = None,
        restart_below: float = 0.0,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, decay, restart_below=restart_below)
        self.gradient = "own"
        self.identity = bounds.number("identity", identity, 0, 1)
        self.mixing = choose("mixing", mixing, ("latents", "blend"))
        self.rows = None if rows is None else bounds.integer("rows", rows, 1, 2**31)
        self.error = nn.Buffer(torch.zeros(()))  # running mean of |z - e|^2

    def _statistics(self) -> tuple[Tensor, ...]:
        trace = self.covariance.trace().clamp_min(torch.finfo(torch.float32).tiny)
        # As many equal directions as have this ratio of moments.
        directions = (trace.square() / self.covariance.square().sum()).nan_to_num(1.0).clamp_min(1.0)
        # Before the first batch has met its codes: the error of the best table for that many directions, in order of
        # magnitude.
        guess = trace * self.codebook_size ** (-2 / directions)
        error = torch.where(self.steps > 1, self.error, guess).maximum(FLOOR * trace)
        return self.mean, self.covariance, power_of_two((error / directions).sqrt()), self.steps

    def _quantized(self, z: Tensor, moving: bool) -> Quantized:
        self.restart_dead(z)
        table, vectors = self.codebook, as_vectors(z)
        _, _, width, step = self._recalled or self._statistics()
        if self.identity == 1:
            indices = nearest(vectors, table)
            chosen = F.embedding(indices, table)
            gradient = chosen + vectors
        elif self.mixing == "blend" or z[0, 0].numel() * (1 - self.identity) < 1:
            soft, indices = self._soft(vectors, table, width)
            chosen = F.embedding(indices, table)
            gradient = (1 - self.identity) * soft + self.identity * (chosen + vectors)
        else:
            turn, others = self._turns(z, step)
            indices = vectors.new_empty(len(vectors), dtype=torch.int64)
            soft, indices[turn] = self._soft(vectors[turn], table, width)
            if len(others):
                indices[others] = nearest(vectors[others], table)
            chosen = F.embedding(indices, table)
            gradient = (chosen + vectors).index_copy(0, turn, soft)
        if moving:
            self._measure(vectors, chosen)
        indices = indices.view(z.shape[0], *z.shape[2:])
        self.count_chosen(z, indices)
        # The chosen code in value, to the bit.
        z_q = as_grid(chosen.detach() + (gradient - gradient.detach()), z)
        return Quantized(z_q, indices, vq_terms(z, as_grid(chosen, z)))

    def _soft(self, vectors: Tensor, table: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of latents (N, D) with the gradient through the softmax, and their indices (N,)."""
        soft, indices, _ = index_backpropagation(
            vectors / width, table / width, temperature=2.0, similarity="l2", entropy=False, rows=self.rows
        )
        return width * soft, indices

    def _turns(self, z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a batch (B, D, *grid) that go through the softmax in this step, and those that do not.

        The same places in every picture, evenly spread, and with each step the next.
        """
        places = z[0, 0].numel()
        count = round((1 - self.identity) * places)
        place = torch.arange(places, device=z.device)
        spread = (place * count % places < count).int()  # `count` ones, as evenly spread as can be
        shifted = (spread.argsort(descending=True, stable=True) + step) % places
        rows = shifted + places * torch.arange(len(z), device=z.device)[:, None]
        return rows[:, :count].flatten(), rows[:, count:].flatten()

    @torch.no_grad()
    def _measure(self, vectors: Tensor, chosen: Tensor) -> None:
        """One step of the running error on latents and their codes, both (N, D), of every process."""
        total = all_sum((vectors - chosen).square().sum().to(self.error.dtype))
        error = total / all_sum(self.error.new_full((), len(vectors)))
        rate = (1 / self.steps).clamp_min(1 - ERROR_DECAY).to(error)
        self.error.lerp_(error, rate)


def power_of_two(value: Tensor) -> Tensor:
    """The power of two nearest to a positive number in ratio, exactly: dividing by it rounds nothing."""
    mantissa, _ = torch.frexp(value)  # in [0.5, 1)
    return value / mantissa * torch.where(mantissa < 0.5**0.5, 0.5, 1.0).to(value)
