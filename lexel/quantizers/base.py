"""The contract every quantizer keeps: latents in, codes out."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError, unknown
from lexel.kernels import SIMILARITIES, Similarity, nearest, sharded
from lexel.quantizers import bounds
from lexel.quantizers.living import LivingCodebook
from lexel.runtime import at_least_float32


class Quantized(NamedTuple):
    """The result of quantizing a grid of latents."""

    z_q: Tensor  # (B, D, *grid), the chosen codes; gradients as the method says
    indices: Tensor  # (B, *index_shape(grid)) int64 in [0, codebook_size): (B, *grid), or (B, books, *grid)
    losses: dict[str, Tensor]  # unweighted scalar terms; the recipe weighs them


class Advice(NamedTuple):
    """Why codes of a quantizer die, and what to try."""

    cause: str
    change: str


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method on latents outside autocast, in at least float32, once their shape is right.

    Half precision changes which code is nearest (about 8 % of them at K = 131,072).
    """

    @functools.wraps(method)
    def run(self: "Quantizer", z: Tensor, *rest: Any) -> Any:
        if z.dim() < 2 or z.shape[1] != self.latent_dim:
            raise UsageError(f"latents must be (B, {self.latent_dim}, *grid), got {tuple(z.shape)}")
        if not z.is_floating_point():
            raise UsageError(f"latents must be floating point, got {z.dtype}")
        if z.numel() == 0:  # before any statistics move
            raise UsageError(f"an empty batch cannot be quantized, got latents {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            return method(self, at_least_float32(z), *rest)

    return run


ONLY_CHOSEN_LEARN = Advice(
    "only chosen codes learn, so a code that is never nearest stays where it started",
    "set restart_below, use affine or simvq (codes move together) or ibq (all learn), or a smaller codebook",
)


class Quantizer(LivingCodebook):
    """A vocabulary of codes for grids of latents.

    Latents are (B, D, *grid) with any number of grid axes. A subclass implements `forward` and stores its codes as
    `weight`, or writes the property `codebook`; `assign`, `indices_to_codes`, `bake` and `searcher` follow from the
    codebook unless the method differs. The class attributes say what the method is, for reports and exporters.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
    """

    LOSS_WEIGHTS: Mapping[str, float] = {}  # every term `forward` returns, with its published weight
    similarity: Similarity = "l2"  # how the table is searched
    gradient: str = "own"  # a name in GRADIENTS where the decoder's gradient skips the codebook; else "own"
    books: int | None = None  # indices are (B, books, *grid), one codebook each; None: (B, *grid)
    prefixes: bool = False  # the first of the books decode without the others
    straight_through: bool = False  # the decoder's gradient skips the codebook on its way to the latents
    batch_dependent: bool = False  # training looks at the whole batch (EMA, affine) or at chance (Gumbel)
    comparable_norms: bool = True  # latents and codes are compared as they are, so that their lengths should agree
    stores_table: bool = True  # K x D numbers lie in memory; False where codes follow from their index
    exact_in_training: bool = True  # z_q is what the indices name in training too, not an average, part or older code
    can_be_sharded: bool = False  # the rows of `weight` may be spread over processes (`lexel.quantizers.sharding`)
    sharded: bool = False  # they are: `weight` has this process's rows, and all processes call together
    advice: Advice = Advice(  # what `dead_codes` says
        "codes fall behind where latents do not go", "train longer, or lower the learning rate of the encoder"
    )
    starts_collapsed: bool = False  # all codes are alike before the first training steps, by design

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size = bounds.integer("codebook_size", codebook_size, 2, 2**53)
        self.codebook_dim = bounds.integer("codebook_dim", codebook_dim, 1, 2**16)
        if self.stores_table:
            bounds.table(codebook_size, codebook_dim)

    def take_after(self, part: "Quantizer") -> None:
        """Says of a quantizer made of others what one of these says of itself."""
        self.LOSS_WEIGHTS, self.similarity, self.gradient = part.LOSS_WEIGHTS, part.similarity, part.gradient
        self.straight_through, self.exact_in_training = part.straight_through, part.exact_in_training
        self.batch_dependent, self.comparable_norms = part.batch_dependent, part.comparable_norms
        self.starts_collapsed = part.starts_collapsed

    @property
    def latent_dim(self) -> int:
        """Channels of the latents that `forward` takes; those of the codes but for means with variances."""
        return self.codebook_dim

    @property
    def codebook(self) -> Tensor:
        """The table in force, after any projection: (K, D); (books, K, D) where there are several."""
        assert isinstance(self.weight, Tensor)
        return self.weight

    def token_grids(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The grids in which an image's indices lie, coarse to fine, where its latents are (D, *grid)."""
        return (grid,)

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an image's indices where its latents are (D, *grid): (*grid), or (books, *grid)."""
        return grid if self.books is None else (self.books, *grid)

    def latent_grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The grid of the latents of an image whose indices have a shape; `index_shape` the other way round.

        Raises:
            UsageError: no grid has indices of this shape.
        """
        if self.books is None:
            return shape
        if not shape or not (shape[0] == self.books or (self.prefixes and 1 <= shape[0] <= self.books)):
            books = f"1 to {self.books}" if self.prefixes else self.books
            raise UsageError(f"indices must be (B, {books}, *grid), got (B, {', '.join(map(str, shape))})")
        return shape[1:]

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes latents (B, D, *grid)."""
        raise NotImplementedError

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        """The index of each latent, without losses: int64 (B, *grid) for z (B, D, *grid)."""
        search = sharded.nearest if self.sharded else nearest
        return search(as_vectors(z), self.codebook, self.similarity).view(z.shape[0], *z.shape[2:])

    def indices_to_codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """The codes that indices name: (B, D, *grid).

        Args:
            indices: int64 (B, *index_shape(grid)).
            grid: of the latents; needed where the shape of the indices does not tell it (several scales in one row).
        """
        if self.sharded:
            return sharded.lookup(indices.flatten(), self.codebook).view(*indices.shape, -1).movedim(-1, 1)
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def bake(self) -> "Quantizer":
        """A plain table of the same vectors that gives the same indices, for export and inference.

        Raises:
            UsageError: no search in a table gives this method's indices.
        """
        return Table.of(self.codebook, self.similarity)

    def searcher(self) -> nn.Module:
        """The module with which an exported program finds and names codes: its `assign` and `indices_to_codes` have
        no step that depends on the data.

        Raises:
            UsageError: there is none, because an image position has several indices or the table cannot be searched.
        """
        if self.books is not None:
            raise UsageError(f"{type(self).__name__}, with several indices a position, cannot be exported")
        table = self.bake()
        codebook = table.codebook
        keys = F.normalize(codebook, dim=1) if table.similarity == "cosine" else codebook
        # |z - e|^2 orders codes as |e|^2 / 2 - z.e does.
        bias = -0.5 * keys.square().sum(1) if table.similarity == "l2" else keys.new_zeros(len(keys))
        return MatrixSearch(codebook, keys, bias)

    def dead_codes(self, seen: Mapping[str, float]) -> Advice:
        """Why codes of this method die and what helps.

        Args:
            seen: the newest validation line of a run: `usage`, `perplexity`, `gradient_ratio` and so on.
        """
        return self.advice

    def loss(self, losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of the terms; weights default to LOSS_WEIGHTS.

        Raises:
            UsageError: a term has no weight.
        """
        return weighted_sum(losses, self.LOSS_WEIGHTS if weights is None else weights)


class Table(Quantizer):
    """A fixed table and the similarity that searches it. It learns nothing and returns no loss terms.

        table = quantizer.bake()
        z_q, indices, _ = table(z)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        similarity: "l2", "dot" or "cosine".
    """

    gradient = "straight_through"
    straight_through = True

    def __init__(self, codebook_size: int, codebook_dim: int, similarity: Similarity = "l2") -> None:
        super().__init__(codebook_size, codebook_dim)
        self.similarity = choose("similarity", similarity, SIMILARITIES)
        self.weight: Tensor = nn.Buffer(torch.zeros(codebook_size, codebook_dim))  # filled by `of` or by a checkpoint

    @classmethod
    def of(cls, codebook: Tensor, similarity: Similarity = "l2") -> Self:
        """A table that holds a copy of `codebook` (K, D)."""
        table = cls(codebook.shape[0], codebook.shape[1], similarity)
        table.weight = codebook.detach().clone()
        return table.eval()

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        indices = self.assign(z)
        return Quantized(straight_through(z, F.embedding(indices, self.weight).movedim(-1, 1)), indices, {})


class MatrixSearch(nn.Module):
    """The largest of z.key + bias by one matrix product: exporters cannot follow tiles that depend on the data.

    Args:
        codebook: (K, D), what an index stands for.
        keys: (K, D), what latents are compared with.
        bias: (K,)
    """

    def __init__(self, codebook: Tensor, keys: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.codebook = nn.Buffer(codebook.detach().float().cpu())
        self.keys = nn.Buffer(keys.detach().float().cpu().T.contiguous())
        self.bias = nn.Buffer(bias.detach().float().cpu())

    def assign(self, z: Tensor) -> Tensor:
        """int64 (B, *grid) for latents (B, D, *grid)."""
        return (z.movedim(1, -1) @ self.keys + self.bias).argmax(-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, D, *grid) for indices (B, *grid)."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum of weights[name] * losses[name]; a term without a weight is an error, a weight without a term is not."""
    for name in losses:
        if name not in weights:
            raise UsageError(f"no weight for the loss term {name!r}; write {name} = 0 to switch it off")
    total = sum((weights[name] * term for name, term in losses.items() if weights[name] != 0), start=0.0)
    return torch.as_tensor(total)


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


Name = TypeVar("Name", bound=str)


def choose(what: str, given: Name, choices: Mapping[str, Any] | tuple[str, ...]) -> Name:
    """`given` if it is one of the choices; a clear error otherwise."""
    if not isinstance(given, str) or given not in choices:
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
