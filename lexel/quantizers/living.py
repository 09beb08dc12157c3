"""Codebooks whose codes come and go: dead codes restarted, unused codes pruned, often used codes split."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lexel.distributed import all_rows, all_sum
from lexel.errors import UsageError
from lexel.kernels import Similarity, nearest
from lexel.kernels.clustering import pick_rows
from lexel.quantizers import bounds
from lexel.quantizers.running import statistics_move

DECAY = 0.99  # of the average number of latents a batch that choose a code


class Recoded(NamedTuple):
    """A quantizer of the same latents with fewer or more codes: what to build, and what to load into it."""

    table: dict[str, Any]  # as in a recipe: kind, codebook_size, codebook_dim and options
    state: dict[str, Tensor]


def times_chosen(indices: Tensor, counts: Tensor) -> Tensor:
    """How many latents of all processes chose each code: as `counts` (K,) in shape and type, of their indices."""
    ones = torch.ones(indices.numel(), dtype=counts.dtype, device=indices.device)
    return all_sum(torch.zeros_like(counts).index_add_(0, indices.flatten(), ones))


class LivingCodebook(nn.Module):
    """Dead codes restarted, pruning and growth of a codebook; the base of `Quantizer`.

    All of it follows from `code_tables` and `rows_for`; a method whose codes are no rows of a table says so by
    `code_tables = ()`, and then refuses.
    """

    codebook_size: int
    codebook_dim: int
    similarity: Similarity
    batch_dependent: bool
    # Tensors of the state with a row for each code, the one that makes the codes first; () where no table does.
    code_tables: tuple[str, ...] = ("weight",)
    restart_below: float = 0.0  # codes that fewer latents a batch choose, on average, start again at latents; 0: never
    why_fixed: str | None = None  # why no code can be added; None where `code_tables` decide
    clustering: bool = False  # whether codes move towards latents, those the most that are chosen the least
    _step_begins: bool | None = None  # None: `anneal` has never told

    def rows_for(self, codes: Tensor) -> Tensor:
        """Rows of the first of `code_tables` that make these codes (n, D)."""
        return codes

    def as_compared(self, z: Tensor) -> Tensor:
        """Latents (B, D, *grid) as codes are compared with them; by default as they are."""
        return z

    # ---------------------------------------------------------------------------------------------- restart

    def follow_use(self, restart_below: float) -> None:
        """Takes a constructor's option `restart_below`; above 0 the state then has the codes' running counts.

        Raises:
            UsageError: it is no number of at least 0.
        """
        self.restart_below = bounds.number("restart_below", restart_below, 0)
        if self.restart_below > 0:
            start = torch.full((self.codebook_size,), max(self.restart_below, 1.0))
            self.counts = nn.Buffer(start)  # average number of latents per batch
            self.counted = nn.Buffer(torch.zeros((), dtype=torch.int64))  # training batches
            self.batch_dependent = True

    def anneal(self, progress: float) -> None:
        """Sets schedules inside the method to `progress` of the training, in [0, 1]; called before every step."""
        self._step_begins = True

    @torch.no_grad()
    def restart_dead(self, z: Tensor) -> None:
        """In training, before latents (B, D, *grid) choose: codes that died start again at some of them.

        At most once a step where `anneal` tells when one begins: a table must not change between two uses in a graph.
        """
        if not (self.restart_below > 0 and self.training and statistics_move(z)) or self._step_begins is False:
            return
        if self._step_begins:
            self._step_begins = False
        self._restart(self.as_compared(z).movedim(1, -1).flatten(0, -2), int(self.counted))

    @torch.no_grad()
    def count_chosen(self, z: Tensor, indices: Tensor) -> None:
        """In training, after latents z chose `indices`: the running counts of all processes move."""
        if self.restart_below > 0 and self.training and statistics_move(z):
            self.counts.lerp_(times_chosen(indices, self.counts), 1 - DECAY)
            self.counted.add_(1)

    def _restart(self, vectors: Tensor, step: int) -> None:
        """Dead codes become random rows of the latents (N, D) of all processes."""
        dead = self.counts < self.restart_below
        if dead.any():
            # The step seeds the choice: processes agree, and a resumed run chooses as an uninterrupted one.
            generator = torch.Generator().manual_seed(step)
            codes = pick_rows(all_rows(vectors), int(dead.sum()), generator).to(self._first_table().dtype)
            self.place(dead, codes, torch.full_like(codes[:, 0], max(self.restart_below, 1.0)))

    def place(self, which: Tensor, codes: Tensor, counts: Tensor) -> None:
        """Puts codes (n, D) with average counts (n,) where the mask `which` (K,) is true."""
        table = self._first_table()
        if self.similarity == "dot" and not bool(which.all()):
            # The longest code wins most latents: new ones are as long as those in use.
            length = table[~which].norm(dim=1).mean()
            codes = codes * (length / codes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(codes.dtype).tiny))
        table[which] = self.rows_for(codes)
        self.counts[which] = counts.to(self.counts.dtype)

    def _first_table(self) -> Tensor:
        return cast(Tensor, getattr(self, self.code_tables[0]))

    # ---------------------------------------------------------------------------------------------- clustering

    def follow_clusters(self, clustering: bool) -> None:
        """Takes a constructor's option `clustering`; the state then has how often codes are chosen."""
        self.clustering = clustering
        if clustering:
            self.use = nn.Buffer(torch.zeros(self.codebook_size))  # each code's running share of the latents
            self.batch_dependent = True

    @torch.no_grad()
    def cluster(self, z: Tensor, indices: Tensor) -> None:
        """In training, after latents z (B, D, *grid) chose `indices`: every code moves towards its nearest latent.

        The online clustering of https://arxiv.org/abs/2307.15139, as TA-TiTok's code has it: by exp(-10 K u / 0.01)
        of the way for a code of running share u, so that one that nobody chooses is there at once. Losses of this
        batch are those of the codes before.
        """
        if not (self.clustering and self.training and statistics_move(z)):
            return
        own, compared = (x.movedim(1, -1).flatten(0, -2) for x in (z, self.as_compared(z)))
        rows = all_rows(own)
        self.use.lerp_(times_chosen(indices, self.use) / len(rows), 1 - DECAY)
        table = self._first_table()
        closest = rows[nearest(cast(Tensor, self.codebook), all_rows(compared), self.similarity)].to(table.dtype)
        share = torch.exp(-self.use * (10 * self.codebook_size / (1 - DECAY)) - 1e-3).to(table.dtype)
        table.lerp_(self.rows_for(closest), share[:, None])

    # ---------------------------------------------------------------------------------------------- prune and grow

    def prune(self, table: Mapping[str, Any], kept: Tensor) -> Recoded:
        """With some of the codes only: their vectors stay to the bit, and code i of the result is code kept[i] here.

        Args:
            table: this quantizer's in a recipe or `config.json`.
            kept: int64 (n,), ascending.

        Raises:
            UsageError: no code of this method can be dropped.
        """
        state = self._state_with_rows("dropped")
        for name in self._tables():
            state[name] = state[name][kept]
        return Recoded({**table, "codebook_size": len(kept)}, state)

    def grow(self, table: Mapping[str, Any], parents: Tensor, codes: Tensor) -> Recoded:
        """With more codes, each of them an old one or one of several that an old one was split into.

        Args:
            table: this quantizer's in a recipe or `config.json`.
            parents: int64 (n,), the old code that each comes from.
            codes: (n, D). Where a parent has a single child, its own row stays to the bit.

        Raises:
            UsageError: no code can be added to this method's.
        """
        if self.why_fixed is not None:
            raise UsageError(f"{type(self).__name__} cannot grow: {self.why_fixed}")
        state = self._state_with_rows("added")
        children = parents.bincount(minlength=self.codebook_size)[parents]
        split = children > 1
        for name in self._tables():
            state[name] = state[name][parents]
        if "counts" in state:
            state["counts"] /= children  # they share the latents
        first = state[self.code_tables[0]]
        first[split] = self.rows_for(codes[split].to(first)).to(first)
        return Recoded({**table, "codebook_size": len(parents)}, state)

    @torch.no_grad()
    def _state_with_rows(self, what: str) -> dict[str, Tensor]:
        """A copy of the state, where every one of `code_tables` has a row for each code."""
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        method = type(self).__name__
        if not self.code_tables:
            raise UsageError(f"no code of {method} can be {what}: its codes are no rows of a table")
        for name in self._tables():
            if name not in state or len(state[name]) != self.codebook_size:
                raise UsageError(
                    f"no code of {method} can be {what}: its code_tables name {name!r}, which has no row for each code"
                )
        return state

    def _tables(self) -> tuple[str, ...]:
        """`code_tables`, and what is known of each code's use where there is any."""
        followed = self.restart_below > 0 and "counts" not in self.code_tables
        names = (*self.code_tables, "counts") if followed else self.code_tables
        return (*names, "use") if self.clustering else names
