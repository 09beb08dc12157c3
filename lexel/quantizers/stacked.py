"""Several quantizers for one latent: what residual and product quantization share."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lexel.errors import UsageError, unknown
from lexel.quantizers.base import Advice, Quantizer
from lexel.quantizers.living import Recoded
from lexel.quantizers.registry import QUANTIZERS, build


class Stacked(Quantizer):
    """Q quantizers of the same kind, one index from each: indices (B, Q, *grid), codebook (Q, K, D).

    z_q is the sum over Q of codebook[q][indices[:, q]]. Loss terms are the mean over the Q quantizers, with their
    weights.

    Attributes:
        books: Q.
        levels: the quantizers.
    """

    books: int
    stores_table = False  # its levels do
    why_fixed = "its books see what others leave, not the latents"

    def __init__(
        self, codebook_size: int, codebook_dim: int, base: str, base_options: Mapping[str, Any] | None, dims: list[int]
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.base_table = {"kind": base, **(base_options or {})}
        self.levels = nn.ModuleList(build_base(base, codebook_size, dim, base_options) for dim in dims)
        self.books = len(dims)
        self.take_after(self[0])

    def __len__(self) -> int:
        return self.books

    def __getitem__(self, q: int) -> Quantizer:
        return cast(Quantizer, self.levels[q % len(self.levels)])  # a shared book stands once

    def __iter__(self) -> Iterator[Quantizer]:
        return (self[q] for q in range(self.books))

    def dead_codes(self, seen: Mapping[str, float]) -> Advice:
        return self[0].dead_codes(seen)

    def prune(self, table: Mapping[str, Any], kept: Tensor) -> Recoded:
        """As `Quantizer.prune`: every book keeps the same codes, so that one map of indices serves all."""
        levels = {f"levels.{q}": self[q].prune(self.base_table, kept) for q in range(len(self.levels))}
        return around_base(self, table, levels, len(kept))

    def anneal(self, progress: float) -> None:
        for level in self:
            level.anneal(progress)


def build_base(base: str, codebook_size: int, codebook_dim: int, options: Mapping[str, Any] | None) -> Quantizer:
    """The quantizer inside a structure of quantizers.

    Raises:
        UsageError: it is a structure itself, its name or an option is unknown, or an option is out of its range.
    """
    simple = [name for name, kind in QUANTIZERS.items() if "base" not in inspect.signature(kind).parameters]
    if base == "none" or (base in QUANTIZERS and base not in simple):
        raise unknown("base quantizer", base, simple)
    for name in ("codebook_size", "codebook_dim"):
        if name in (options or {}):
            raise UsageError(f"base_options cannot hold {name}: it is the quantizer's own {name}")
    return build(base, {"codebook_size": codebook_size, "codebook_dim": codebook_dim, **(options or {})})


def around_base(quantizer: Quantizer, table: Mapping[str, Any], parts: Mapping[str, Recoded], count: int) -> Recoded:
    """A structure of quantizers whose `parts`, named by their module, are others now and have `count` codes."""
    options = dict(next(iter(parts.values())).table)
    kind = options.pop("kind")
    options = {name: value for name, value in options.items() if name not in ("codebook_size", "codebook_dim")}
    changed = {"codebook_size": count, "base": kind, "base_options": options}
    return Recoded({**table, **changed}, state_with_parts(quantizer, parts))


def state_with_parts(quantizer: Quantizer, parts: Mapping[str, Recoded]) -> dict[str, Tensor]:
    """The state of a structure, with those of its `parts` replaced."""
    inside = tuple(f"{name}." for name in parts)
    own = {name: tensor for name, tensor in quantizer.state_dict().items() if not name.startswith(inside)}
    return own | {f"{part}.{name}": tensor for part, new in parts.items() for name, tensor in new.state.items()}


def mean_terms(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each loss term over several quantizers."""
    return {name: torch.stack([terms[name] for terms in losses]).mean() for name in losses[0]}
