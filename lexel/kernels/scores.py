"""Scores of pairs of a row and a code, and of a few rows against all codes, as exactly as they are needed."""

import warnings

import torch
from torch import Tensor

TILE = 1024  # codes scanned together: a tile of float32 scores (4 MiB) stays in the cache


def minus_squares(keys: Tensor) -> Tensor:
    """-|k|^2 of each row: (K,) float64. 2 q.k - |k|^2 orders codes as the distance |q - k| does."""
    return torch.cat([-tile.double().square().sum(1) for tile in keys.split(codes_at_a_time(keys))])


def codes_at_a_time(keys: Tensor) -> int:
    """Codes handled at a time: a GPU would wait for the launches of small tiles."""
    return TILE if keys.device.type == "cpu" else 64 * TILE


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def sampled_products(queries: Tensor, keys: Tensor, rows: Tensor, codes: Tensor) -> Tensor:
    """queries[rows] . keys[codes], one number a pair; rows must ascend."""
    if queries.device.type == "cpu":
        starts = torch.bincount(rows, minlength=len(queries)).cumsum(0)
        starts = torch.cat([starts.new_zeros(1), starts])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
            pattern = torch.sparse_csr_tensor(
                starts,
                codes,
                torch.zeros_like(codes, dtype=keys.dtype),
                (len(queries), len(keys)),
                check_invariants=False,
            )
        return torch.sparse.sampled_addmm(pattern, queries, keys.T, beta=0.0).values()
    products = [(queries[r] * keys[c]).sum(1) for r, c in zip(rows.split(2**17), codes.split(2**17), strict=True)]
    return torch.cat(products) if products else queries.new_empty(0)


def exact_scores(queries: Tensor, keys: Tensor, bias: Tensor | None, rows: Tensor, codes: Tensor) -> Tensor:
    """The scores of pairs (row, code) in float64; equal codes get equal scores."""
    scores = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    together = 1024 if rows.device.type == "cpu" else 64 * 1024
    for part in range(0, len(rows), together):
        some = slice(part, part + together)
        scores[some] = (queries[rows[some]].double() * keys[codes[some]]).sum(1)
    return scores if bias is None else scores + bias[codes]


def search_exactly(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """The lowest best code of rows that a scan cannot decide, by products in float64: (n,)."""
    queries = queries.double()
    size = queries.norm(dim=1)
    best = torch.full_like(size, -torch.inf)
    indices = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    together = codes_at_a_time(keys)
    for start in range(0, len(keys), together):
        tile = keys[start : start + together].double()
        scores = queries @ tile.T
        largest = size * tile.norm(dim=1).amax()
        if bias is not None:
            scores += bias[start : start + together]
            largest += bias[start : start + together].abs().amax()
        ties = 2.02 * (keys.shape[1] + 2) * unit(torch.float64) * largest
        maximum = scores.amax(1)
        better = maximum > best + ties
        index = (scores >= (maximum - ties)[:, None]).int().argmax(1)  # the first within a tie
        indices = torch.where(better, index + start, indices)
        best = torch.where(better, maximum, best)
    return indices
