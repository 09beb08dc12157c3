"""The contract every quantizer keeps: latents in, codes out."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError, unknown
from lexel.kernels import nearest


class Quantized(NamedTuple):
    """The result of quantizing a grid of latents."""

    z_q: Tensor  # (B, D, *grid), the chosen codes; gradients as the method says
    indices: Tensor  # (B, *grid) int64 in [0, codebook_size); (B, Q, *grid) for residual and product
    losses: dict[str, Tensor]  # unweighted scalar terms; the recipe weighs them


def full_precision(method: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Runs a method on latents outside autocast, in at least float32, once their shape is right.

    Half precision changes which code is nearest (about 8 % of them at K = 131,072).
    """

    @functools.wraps(method)
    def run(self: "Quantizer", z: Tensor) -> Any:
        if z.dim() < 2 or z.shape[1] != self.codebook_dim:
            raise UsageError(f"latents must be (B, {self.codebook_dim}, *grid), got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            return method(self, z.to(torch.promote_types(z.dtype, torch.float32)))

    return run


class Quantizer(nn.Module):
    """A vocabulary of codes for grids of latents.

    Latents are (B, D, *grid) with any number of grid axes. A subclass implements `forward` and the property
    `codebook`; `assign`, `indices_to_codes` and `bake` follow from the codebook unless the method differs.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
    """

    LOSS_WEIGHTS: Mapping[str, float] = {}  # every term `forward` returns, with its published weight
    similarity: Any = "l2"  # how the table is searched: "l2", "dot" or "cosine"
    gradient: str = "own"  # a name in GRADIENTS where the decoder's gradient passes the codes by; else "own"

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        if codebook_size < 2:
            raise UsageError(f"codebook_size must be at least 2, got {codebook_size}")
        if codebook_dim < 1:
            raise UsageError(f"codebook_dim must be at least 1, got {codebook_dim}")
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim

    @property
    def codebook(self) -> Tensor:
        """The table in force, after any projection: (K, D)."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes latents (B, D, *grid)."""
        raise NotImplementedError

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        """The index of each latent, without losses: int64 (B, *grid) for z (B, D, *grid)."""
        return nearest(as_vectors(z), self.codebook, self.similarity).view(z.shape[0], *z.shape[2:])

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes that indices (B, *grid) name: (B, D, *grid)."""
        return lookup(indices, self.codebook).movedim(-1, 1)

    def bake(self) -> "Quantizer":
        """A plain table of the same vectors that gives the same indices, for export and inference.

        Raises:
            UsageError: no search in a table gives this method's indices.
        """
        from lexel.quantizers.table import Table  # the table is a quantizer too

        return Table.of(self.codebook, self.similarity)

    def anneal(self, progress: float) -> None:
        """Told before every training step how far training is, in [0, 1]; for schedules inside a method."""

    def loss(self, losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of the terms; weights default to LOSS_WEIGHTS.

        Raises:
            UsageError: a term has no weight.
        """
        return weighted_sum(losses, self.LOSS_WEIGHTS if weights is None else weights)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum of weights[name] * losses[name]; a term without a weight is an error, a weight without a term is not."""
    for name in losses:
        if name not in weights:
            raise UsageError(f"no weight for the loss term {name!r}; write {name} = 0 to switch it off")
    total = sum((weights[name] * term for name, term in losses.items() if weights[name] != 0), start=0.0)
    return torch.as_tensor(total)


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """Rows of codebook (K, D) named by indices of any shape: (*indices.shape, D)."""
    return nn.functional.embedding(indices, codebook)


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q in value (to the bit), z in gradient."""
    return z_q.detach() + (z - z.detach())


def rotate(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q in value (to the bit); in gradient the rotation and scaling that takes z to z_q, held constant.

    The rotation trick (https://arxiv.org/abs/2410.06424): with e = z/|z|, q = z_q/|z_q| and r = (e + q)/|e + q|,
    the map is |z_q|/|z| (I - 2 r r^T + 2 q e^T). Channels are dimension 1.
    """
    with torch.no_grad():
        e, q = F.normalize(z, dim=1, eps=1e-6), F.normalize(z_q, dim=1, eps=1e-6)
        r = F.normalize(e + q, dim=1, eps=1e-6)
        scale = z_q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(1e-6)
    rotated = scale * (z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * q * (e * z).sum(1, keepdim=True))
    return z_q.detach() + (rotated - rotated.detach())


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotate}


def choose(what: str, given: str, choices: Mapping[str, Any] | tuple[str, ...]) -> str:
    """`given` if it is one of the choices; a clear error otherwise."""
    if given not in choices:
        raise unknown(what, given, choices)
    return given


def vq_terms(z: Tensor, z_q: Tensor) -> dict[str, Tensor]:
    """The two halves of the vector-quantization loss, by what they move."""
    return {
        "codebook": F.mse_loss(z_q, z.detach()),  # moves the codes to the latents
        "commitment": F.mse_loss(z, z_q.detach()),  # keeps the latents near their codes
    }


def cosine_decay(start: float, end: float, progress: Tensor) -> Tensor:
    """Half a cosine from `start` at progress 0 to `end` at 1."""
    return end + (start - end) * 0.5 * (1 + (math.pi * progress).cos())


def as_vectors(z: Tensor) -> Tensor:
    """Latents (B, D, *grid) as rows (B * prod(grid), D)."""
    return z.movedim(1, -1).flatten(0, -2)


def as_grid(vectors: Tensor, z: Tensor) -> Tensor:
    """Rows (B * prod(grid), D) as latents of the grid of z: (B, D, *grid)."""
    return vectors.view(z.shape[0], *z.shape[2:], -1).movedim(-1, 1)
