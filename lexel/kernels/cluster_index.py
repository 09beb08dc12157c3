"""Approximate search: codes in clusters, of which only those near a latent are looked through (an inverted file)."""

import math

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.kernels.clustering import kmeans
from lexel.kernels.inputs import Similarity, as_scores, check_rows, check_similarity
from lexel.kernels.nearest import nearest
from lexel.kernels.scores import minus_squares
from lexel.runtime import at_least_float32

ROWS = 4096  # latents searched for together


class ClusterIndex:
    """An index for approximate nearest-code search in a large table that no longer changes; misses can be counted.

    About sqrt(K) clusters; a latent is compared with their centres and with the codes of the `probes` nearest. It may
    miss the best code where that lies just beyond them: `miss_rate` says how often. Nothing in Lexel uses it unasked;
    `nearest` is exact.

        index = ClusterIndex(tokenizer.quantizer.codebook)
        index.miss_rate(vectors[:1000])  # against the exact search
        indices = index.nearest(vectors)

    Args:
        codebook: (K, D); the index holds a sorted copy, so build it anew when codes move.
        similarity: "l2", "dot" or "cosine", as in `nearest`.
        clusters: how many; sqrt(K) if not given.
        probes: clusters looked through for a latent: more of them miss less and take longer.

    Raises:
        UsageError: the table is empty or no table, or a number is out of range.
    """

    def __init__(
        self, codebook: Tensor, similarity: Similarity = "l2", clusters: int | None = None, probes: int = 8
    ) -> None:
        check_rows(codebook[:1], codebook)
        check_similarity(similarity)
        clusters = clusters or math.isqrt(len(codebook))
        if not 1 <= clusters <= len(codebook):
            raise UsageError(f"clusters must be in [1, {len(codebook)}], got {clusters}")
        if not 1 <= probes <= clusters:
            raise UsageError(f"probes must be in [1, {clusters}], got {probes}")
        self.codebook, self.similarity, self.probes = codebook.detach(), similarity, probes
        with torch.no_grad():
            table = at_least_float32(self.codebook)
            _, keys, distance = as_scores(table[:1], table, similarity)
            self.centres, _ = kmeans(keys, clusters)
            members = nearest(keys, self.centres)
            self.order = members.argsort(stable=True)  # codes by cluster, ascending within each
            self.keys = keys[self.order]
            self.bias = minus_squares(self.keys).to(keys.dtype) if distance else None
            self.centres_bias = minus_squares(self.centres).to(keys.dtype) if distance else None
            ends = torch.bincount(members, minlength=clusters).cumsum(0).tolist()
            self.places = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """The index of the best code that was looked at for each row of z (N, D): int64 (N,).

        Raises:
            UsageError: shapes do not fit, or the batch is empty.
        """
        check_rows(z, self.codebook)
        with torch.autocast(z.device.type, enabled=False):
            queries = as_scores(z.to(self.keys.dtype), self.codebook[:1].to(self.keys.dtype), self.similarity)[0]
            return torch.cat([self._search(rows) for rows in queries.split(ROWS)])

    def miss_rate(self, z: Tensor) -> float:
        """The share of the rows of z (N, D) whose code is not the one that the exact search finds."""
        return (self.nearest(z) != nearest(z, self.codebook, self.similarity)).double().mean().item()

    def _search(self, queries: Tensor) -> Tensor:
        closeness = queries @ self.centres.T
        if self.centres_bias is not None:
            closeness += self.centres_bias
        probed = closeness.topk(self.probes, 1).indices.flatten()
        best = queries.new_full((len(queries),), -torch.inf)
        found = torch.zeros_like(best, dtype=torch.int64)
        by_cluster = probed.argsort(stable=True)
        counts = torch.bincount(probed, minlength=len(self.places)).tolist()
        rows_of_clusters = (by_cluster // self.probes).split(counts)
        for place, rows in zip(self.places, rows_of_clusters, strict=True):
            if not len(rows) or place.start == place.stop:
                continue
            scores = queries[rows] @ self.keys[place].T
            if self.bias is not None:
                scores += self.bias[place]
            score, code = scores.max(1)
            code = self.order[place][code]
            better = score > best[rows]
            best[rows], found[rows] = torch.where(better, score, best[rows]), torch.where(better, code, found[rows])
        return found
