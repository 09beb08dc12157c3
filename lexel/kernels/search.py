"""Exact search for the best code, in tiles: no tensor of N x K at any size.

A scan with matrix products keeps one maximum for every GROUP codes. Codes whose group comes within a proven rounding
bound of the best are scored again in float64, so the answer is that of exact arithmetic: it depends neither on tile
sizes, nor on the rest of the batch, nor on the precision of the scan.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # rows scanned together
TILE = 1024  # codes scanned together: a tile of float32 scores (4 MiB) stays in the cache
GROUP = 16  # codes that share one maximum
WIDTH = 16  # near codes listed for a row; a row with more is broad


class Near(NamedTuple):
    """The codes of each row whose exact score lies within a slack of the best one."""

    best: Tensor  # (N,) int64, the lowest code at the maximum
    codes: Tensor  # (N, WIDTH) int64 ascending, filled up with 0
    scores: Tensor  # (N, WIDTH) float64, filled up with -inf
    broad: Tensor  # (N,) bool: more than WIDTH codes are near; the lists of such a row are empty


@torch.no_grad()
def near_codes(queries: Tensor, keys: Tensor, bias: Tensor | None = None, slack: float = 0.0) -> Near:
    """Lists the codes within `slack` of the best score queries @ keys.T + bias.

    Args:
        queries: (N, D), float32 or float64.
        keys: (K, D), of the same type.
        bias: (K,) float64, added to every row of scores.
        slack: how far below the best a listed code may be, in units of the score.
    """
    rounding = rounding_bound(queries, keys, bias)
    blocks = [
        _near_block(rows, keys, bias, slack, bound)
        for rows, bound in zip(queries.split(ROWS), rounding.split(ROWS), strict=True)
    ]
    return Near(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def rounding_bound(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """How far a computed score may be from the exact one, whatever the order of summation: (N,)."""
    # |fl(q.k) - q.k| <= D u |q| |k| / (1 - D u), and one rounding more for the bias; 1.01 covers the denominator.
    unit = torch.finfo(queries.dtype).eps / 2
    size = queries.norm(dim=1) * torch.stack([tile.norm(dim=1).amax() for tile in keys.split(16 * TILE)]).amax()
    if bias is not None:
        size = size + bias.abs().amax().to(size.dtype)
    return 1.01 * (queries.shape[1] + 2) * unit * size


def minus_squares(keys: Tensor) -> Tensor:
    """-|k|^2 of each row: (K,) float64. 2 q.k - |k|^2 orders codes as the distance |q - k| does."""
    return torch.cat([-tile.double().square().sum(1) for tile in keys.split(TILE)])


def _near_block(queries: Tensor, keys: Tensor, bias: Tensor | None, slack: float, rounding: Tensor) -> Near:
    maxima = _group_maxima(queries, keys, bias)  # (n, groups)
    lowest = maxima.amax(1) - slack - 2 * rounding  # a code computed below this is not within the slack of the best
    near_groups = maxima >= lowest[:, None]
    broad = near_groups.sum(1) > WIDTH
    broad |= ~lowest.isfinite()  # the scan overflowed or met a NaN
    rows, groups = (near_groups & ~broad[:, None]).nonzero(as_tuple=True)
    del maxima, near_groups
    rows, codes = _codes_of_groups(queries, keys, bias, rows, groups, lowest)

    # Scores within the rounding of float64 are ties.
    ties = 2 * rounding.double() * (torch.finfo(torch.float64).eps / torch.finfo(queries.dtype).eps)
    scores = _exact_scores(queries, keys, bias, rows, codes)
    maximum = scores.new_full((len(queries),), -torch.inf).scatter_reduce(0, rows, scores, "amax")
    keep = scores >= (maximum - slack - ties)[rows]
    rows, codes, scores = rows[keep], codes[keep], scores[keep]
    order = (rows * len(keys) + codes).argsort()
    rows, codes, scores = rows[order], codes[order], scores[order]

    counts = torch.bincount(rows, minlength=len(queries))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # 0, 1, ... in each row
    broad |= counts > WIDTH
    listed = ~broad[rows]
    where = (rows[listed], place[listed])
    near = codes.new_zeros(len(queries), WIDTH).index_put(where, codes[listed])
    near_scores = scores.new_full((len(queries), WIDTH), -torch.inf).index_put(where, scores[listed])

    first = (near_scores >= (maximum - ties)[:, None]).int().argmax(1, keepdim=True)
    best = near.gather(1, first).squeeze(1)
    some = broad.nonzero().squeeze(1)
    if len(some):
        best[some] = _search_exactly(queries[some], keys, bias, ties[some])
    return Near(best, near, near_scores, broad)


def _group_maxima(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """The best score in every group of codes: (n, number of groups).

    Group j of a tile holds its codes j, j + TILE / GROUP, j + 2 TILE / GROUP, ...: maxima of contiguous vectors are ten
    times faster than maxima within one.
    """
    tiles = math.ceil(len(keys) / TILE)
    maxima = queries.new_empty(len(queries), tiles, TILE // GROUP)
    scores = queries.new_empty(len(queries), TILE)
    for tile in range(tiles):
        part = slice(tile * TILE, (tile + 1) * TILE)
        inside = scores
        if len(keys[part]) < TILE:
            scores.fill_(-torch.inf)
            inside = scores[:, : len(keys[part])]
        if bias is None:
            torch.mm(queries, keys[part].T, out=inside)
        else:
            torch.addmm(bias[part].to(queries.dtype), queries, keys[part].T, out=inside)
        maxima[:, tile] = scores.view(-1, GROUP, TILE // GROUP).amax(1)
    return maxima.flatten(1)


def _codes_of_groups(
    queries: Tensor, keys: Tensor, bias: Tensor | None, rows: Tensor, groups: Tensor, lowest: Tensor
) -> tuple[Tensor, Tensor]:
    """The pairs (row, code) within the pairs (row, group) whose score reaches the row's lowest."""
    per_tile = TILE // GROUP
    first = groups.div(per_tile, rounding_mode="floor") * TILE + groups % per_tile
    codes = first[:, None] + per_tile * torch.arange(GROUP, device=rows.device)  # (pairs, GROUP)
    inside = codes < len(keys)
    codes.clamp_(max=len(keys) - 1)
    near = torch.zeros_like(inside)
    for part in range(0, len(rows), ROWS):
        some = slice(part, part + ROWS)
        scores = torch.bmm(keys[codes[some]], queries[rows[some], :, None]).squeeze(2)
        if bias is not None:
            scores += bias[codes[some]].to(scores.dtype)
        near[some] = scores >= lowest[rows[some], None]
    pair, member = (near & inside).nonzero(as_tuple=True)
    return rows[pair], codes[pair, member]


def _exact_scores(queries: Tensor, keys: Tensor, bias: Tensor | None, rows: Tensor, codes: Tensor) -> Tensor:
    """The scores of pairs (row, code) in float64; equal codes get equal scores."""
    scores = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for part in range(0, len(rows), 4 * ROWS):
        some = slice(part, part + 4 * ROWS)
        scores[some] = (queries[rows[some]].double() * keys[codes[some]]).sum(1)
    return scores if bias is None else scores + bias[codes]


def _search_exactly(queries: Tensor, keys: Tensor, bias: Tensor | None, ties: Tensor) -> Tensor:
    """The lowest best code of rows that a scan cannot decide, by a scan in float64: (n,)."""
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=queries.device)
    indices = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    queries = queries.double()
    for start in range(0, len(keys), TILE):
        scores = queries @ keys[start : start + TILE].double().T
        if bias is not None:
            scores += bias[start : start + TILE]
        maximum = scores.amax(1)
        better = maximum > best + ties
        index = (scores >= (maximum - ties)[:, None]).int().argmax(1)  # the first within a tie
        indices = torch.where(better, index + start, indices)
        best = torch.where(better, maximum, best)
    return indices
