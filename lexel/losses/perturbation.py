"""Perturbation of codes between quantizer and decoder, so that the decoder bears a generator's mistakes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lexel import registry
from lexel.errors import UsageError
from lexel.runtime import without_autocast


class Codes(NamedTuple):
    """Inputs of a perturbation: latents and codes of a batch."""

    z: Tensor  # (B, D, *grid), latents before quantization
    z_q: Tensor  # (B, D, *grid), the chosen codes, with gradients
    codebook: Tensor  # (K, D)
    similarity: str  # how the codebook is searched: "l2", "dot" or "cosine"


class Perturbation(Protocol):
    """Codes (B, D, *grid) for the decoder instead of those that were chosen; only training asks for it."""

    def __call__(self, codes: Codes, progress: float) -> Tensor:
        """The codes that the decoder gets; `progress` is from 0 at the first step of a training to 1 at its last."""
        ...


class NearCodes:
    """RobustTok's latent perturbation: tokens are swapped for near ones (https://arxiv.org/abs/2503.08354).

    Each image is perturbed with the probability `images`; in it each token, with the probability `tokens`, becomes one
    of the `neighbours` codes that lie nearest to its latent, each as likely. `tokens` and `neighbours` shrink together
    from `start` to `stop`, linearly to the share `end`. Gradients pass as if nothing had been swapped. Random numbers
    are those of the step, so that a resumed run goes on bit for bit. The published code perturbs the first images of a
    batch instead of each with a probability, which would depend on the batch.

    Args:
        images: probability of an image.
        tokens: probability of each of its tokens.
        neighbours: how many of the nearest codes to choose from, at most the codebook's size.
        start: share of the training after which the perturbation begins to shrink.
        stop: share of the training after which it stays.
        end: what is left of it then.

    Raises:
        UsageError: a value is out of its range.
    """

    def __init__(
        self,
        images: float = 0.1,
        tokens: float = 1.0,
        neighbours: int = 100,
        start: float = 0.2,
        stop: float = 0.6,
        end: float = 0.5,
    ) -> None:
        shares = {"images": images, "tokens": tokens, "start": start, "stop": stop, "end": end}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UsageError(f"the perturbation near_codes needs {name} in [0, 1], got {share}")
        if neighbours < 1 or start > stop:
            raise UsageError(
                "the perturbation near_codes needs neighbours >= 1 and start <= stop, got "
                f"{neighbours}, {start}, {stop}"
            )
        self.images, self.tokens, self.neighbours = images, tokens, neighbours
        self.start, self.stop, self.end = start, stop, end

    def strength(self, progress: float) -> float:
        """The share of `tokens` and `neighbours` in force at `progress` of the training."""
        if progress < self.start:
            return 1.0
        if progress >= self.stop:
            return self.end
        return 1 - (1 - self.end) * (progress - self.start) / (self.stop - self.start)

    @torch.no_grad()
    def swapped(self, codes: Codes, progress: float) -> tuple[Tensor, Tensor]:
        """Which tokens are swapped, bool (B, *grid), and for what: rows (n, D) in that order."""
        strength = self.strength(progress)
        shape, device = (codes.z.shape[0], *codes.z.shape[2:]), codes.z.device
        chosen = torch.rand(shape[0], device=device) < self.images
        swap = torch.rand(shape, device=device) < self.tokens * strength
        swap &= chosen.view(-1, *(1,) * (len(shape) - 1))
        count = min(max(int(self.neighbours * strength), 1), len(codes.codebook))
        rows = codes.z.movedim(1, -1)[swap].to(codes.codebook.dtype)  # (n, D)
        ranks = torch.randint(count, (len(rows),), device=device)
        near = nearest_codes(rows, codes.codebook, count, codes.similarity)  # (n, count)
        return swap, codes.codebook[near.gather(1, ranks[:, None])[:, 0]]

    def __call__(self, codes: Codes, progress: float) -> Tensor:
        swap, vectors = self.swapped(codes, progress)
        values = codes.z_q.detach().movedim(1, -1).clone()
        values[swap] = vectors.to(values.dtype)
        return values.movedim(-1, 1) + (codes.z_q - codes.z_q.detach())


ELEMENTS = 2**24  # of the matrix of distances, at a time


@torch.no_grad()
def nearest_codes(rows: Tensor, codebook: Tensor, count: int, similarity: str = "l2") -> Tensor:
    """The `count` codes nearest to each row, nearest first: int64 (N, count) for rows (N, D), codebook (K, D)."""
    if similarity == "cosine":
        rows, codebook = F.normalize(rows, dim=1), F.normalize(codebook, dim=1)
    bias = 0.5 * codebook.square().sum(1) if similarity == "l2" else codebook.new_zeros(len(codebook))
    with without_autocast(rows.device):
        parts = rows.split(max(1, ELEMENTS // len(codebook)))
        return torch.cat([(part @ codebook.T - bias).topk(count, dim=1).indices for part in parts])


PERTURBATIONS: dict[str, type[NearCodes]] = {"near_codes": NearCodes}
GROUP = "lexel.perturbations"  # the entry points by which other packages add theirs


def build(options: Mapping[str, Any]) -> Perturbation:
    """The perturbation of a recipe's table: its `kind`, and the options of its constructor.

    Raises:
        UsageError: the kind is missing or unknown, or an option does not fit.
    """
    table = dict(options)
    kind = table.pop("kind", None)
    if kind is None:
        raise UsageError(f"a perturbation needs a kind; choose from {', '.join(registry.names(PERTURBATIONS, GROUP))}")
    return registry.build(registry.lookup(PERTURBATIONS, kind, "perturbation", GROUP), kind, table, "perturbation")
