"""Exact search for the best code, in tiles: no tensor of N x K at any size.

A scan with matrix products keeps one maximum for every GROUP codes. Codes whose group comes within a proven rounding
bound of the best are scored again in float32, and those still in question in float64, so the answer is that of exact
arithmetic: it depends neither on tile sizes, nor on the rest of the batch, nor on the precision of the scan. The scan
therefore runs in what the processor multiplies fastest: int8 on CPUs with VNNI, whose products are exact integers, or
bfloat16.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.kernels.inputs import choose_implementation, has_half_products
from lexel.kernels.rounding import APART, GROUP, Norms, Rounded, prepared, rounded, row_errors, scan_error
from lexel.kernels.scores import TILE, exact_scores, minus_squares, sampled_products, search_exactly, unit

ROWS = 1024  # rows scanned together
WIDTH = 16  # near codes listed for a row; a row with more is wide
SMALLEST_HALF = 64  # dimensions from which a CPU scans faster in bfloat16: below, what it saves goes into conversions
LARGEST_INT8 = 2**16  # dimensions: above, sums may leave an int32
LEAST_INT8 = 256, 16384  # rows and codes from which on making a table in int8 pays
NEAR_GROUPS = {torch.int8: 64}  # groups scored again for a row before a finer scan is cheaper; WIDTH for other scans


class Candidates(NamedTuple):
    """The codes of each row whose exact score lies within a slack of the best one."""

    best: Tensor  # (N,) int64, the lowest code at the maximum
    codes: Tensor  # (N, WIDTH) int64 ascending, filled up with 0
    scores: Tensor  # (N, WIDTH) float64, filled up with -inf
    wide: Tensor  # (N,) bool: more than WIDTH codes are near; the lists of such a row are empty
    counts: Tensor  # (2,) int64 in main memory: how many rows are wide, how many codes are listed in all


def joined(blocks: list[Candidates]) -> Candidates:
    """The candidates of consecutive rows as one."""
    if len(blocks) == 1:
        return blocks[0]
    best, codes, scores, wide = (torch.cat(parts) for parts in zip(*(block[:4] for block in blocks), strict=True))
    return Candidates(best, codes, scores, wide, torch.stack([block.counts for block in blocks]).sum(0))


@torch.no_grad()
def near_codes(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None = None,
    slack: float = 0.0,
    scan: torch.dtype | None = None,
    implementation: str = "tiled",
) -> Candidates:
    """Lists the codes within `slack` of the best score queries @ keys.T + bias.

    Args:
        queries: (N, D), float32 or float64.
        keys: (K, D), of the same type.
        bias: (K,) float64, added to every row of scores.
        slack: how far below the best a listed code may be, in units of the score.
        scan: the precision of the scan, which decides the time and nothing else; by default the fastest.
        implementation: of the scan, "tiled" or "triton"; the latter has kernels for a scan in bfloat16.
    """
    if scan is None:
        single = queries.dtype == torch.float32
        scan = _fastest(queries.device, len(queries), *keys.shape) if single else queries.dtype
    together = ROWS if queries.device.type == "cpu" else 4 * ROWS
    if implementation == "triton" and scan == torch.bfloat16:
        return _triton_near_codes(queries, keys, bias, slack, together)
    norms, table = prepared(keys, scan)
    return joined([_near_block(rows, keys, bias, slack, scan, norms, table) for rows in queries.split(together)])


def _triton_near_codes(queries: Tensor, keys: Tensor, bias: Tensor | None, slack: float, together: int) -> Candidates:
    """`near_codes` by kernels of fixed shapes: one wait for the device, which tells whether a row is wide."""
    from lexel.kernels import triton_search  # needs the triton package

    keys = keys.contiguous()
    low, lengths, losses = triton_search.prepare(keys)
    norms = Norms(lengths.amax(), losses.amax())
    blocks = []
    for rows in queries.contiguous().split(together):
        found = Candidates(
            *triton_search.near_codes(rows, keys, bias, slack, (low, norms.keys, norms.residual), GROUP, APART, WIDTH)
        )
        if found.counts[0]:
            found = finer(found, found.wide.nonzero().squeeze(1), rows, keys, bias, slack, norms)
        blocks.append(found)
    return joined(blocks)


def best_codes(queries: Tensor, keys: Tensor, distance: bool, implementation: str) -> Tensor:
    """The best code of each row: int64 (N,)."""
    bias = minus_squares(keys) if distance else None
    return near_codes(queries, keys, bias, implementation=implementation).best


def search_on(device: torch.device, rows: int, codes: int, dims: int) -> str:
    """How `nearest` searches float32 rows on a device, for people: "tiled, scanned in bfloat16"."""
    implementation = choose_implementation("auto", torch.empty(0, device=device))
    return f"{implementation}, scanned in {str(_fastest(device, rows, codes, dims)).removeprefix('torch.')}"


def _fastest(device: torch.device, rows: int, codes: int, dims: int) -> torch.dtype:
    """The precision in which a scan of float32 numbers takes the least time."""
    smallest = SMALLEST_HALF if device.type == "cpu" else 32
    if rows * codes < 2**20 or dims < smallest:
        return torch.float32
    large = rows >= LEAST_INT8[0] and codes >= LEAST_INT8[1] and dims <= LARGEST_INT8
    if device.type == "cpu" and large and _has_int8_products():
        return torch.int8
    return torch.bfloat16 if has_half_products(device) else torch.float32


def _has_int8_products() -> bool:
    """Whether a CPU multiplies int8 faster than bfloat16, measured without AMX (`python -m benchmarks scans`)."""
    return torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()


def _near_block(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    slack: float,
    scan: torch.dtype,
    norms: Norms,
    table: Rounded | None,
) -> Candidates:
    maxima = _group_maxima(table, queries, keys, bias, scan)  # (n, groups)
    best = maxima.amax(1).to(queries.dtype)
    below = slack + 2 * scan_error(queries, bias, scan, norms)
    if scan not in (queries.dtype, torch.int8) and bias is None:
        below += 3.1 * unit(scan) * (best.abs() + below)  # both the best and the code in question are stored rounded
    if queries.is_cuda and scan == torch.float32:
        below += 2 * 1.01 * 2.0**-10 * queries.norm(dim=1) * norms.keys  # PyTorch's settings may allow TF32 products
    lowest = best - below  # a code computed below this is not within the slack of the best
    near_groups = maxima >= lowest[:, None].to(maxima.dtype)
    wide = ~lowest.isfinite()  # the scan overflowed or met a NaN
    # Ten times faster than counting what is not zero.
    wide |= near_groups.view(torch.uint8).sum(1, dtype=torch.int32) > NEAR_GROUPS.get(scan, WIDTH)
    rows, groups = (near_groups & ~wide[:, None] if wide.any() else near_groups).nonzero(as_tuple=True)
    if norms.of_groups is not None:
        rows, groups = _nearer(maxima, rows, groups, slack, row_errors(queries, bias, scan).of(*norms.of_groups))
    del maxima, near_groups
    rows, codes = _codes_of_groups(queries, keys, bias, slack, norms, rows, groups)

    # Scores within the rounding of float64 are ties.
    single = scan_error(queries, bias, queries.dtype, norms)
    ties = 2 * single.double() * (unit(torch.float64) / unit(queries.dtype))
    scores = exact_scores(queries, keys, bias, rows, codes)
    maximum = scores.new_full((len(queries),), -torch.inf).scatter_reduce(0, rows, scores, "amax")
    keep = scores >= (maximum - slack - ties)[rows]
    rows, codes, scores = rows[keep], codes[keep], scores[keep]
    order = (rows * len(keys) + codes).argsort()
    rows, codes, scores = rows[order], codes[order], scores[order]

    counts = torch.bincount(rows, minlength=len(queries))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # 0, 1, ... in each row
    wide |= counts > WIDTH
    listed = ~wide[rows]
    where = (rows[listed], place[listed])
    near = codes.new_zeros(len(queries), WIDTH).index_put(where, codes[listed])
    near_scores = scores.new_full((len(queries), WIDTH), -torch.inf).index_put(where, scores[listed])
    first = (near_scores >= (maximum - ties)[:, None]).int().argmax(1, keepdim=True)
    some = wide.nonzero().squeeze(1)
    total = torch.tensor([len(some), len(where[0])])
    found = Candidates(near.gather(1, first).squeeze(1), near, near_scores, wide, total)
    if len(some) and scan != queries.dtype:  # too many codes for this precision: a finer one may tell them apart
        return finer(found, some, queries, keys, bias, slack, norms)
    if len(some):
        found.best[some] = search_exactly(queries[some], keys, bias)
    return found


def finer(
    found: Candidates, some: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None, slack: float, norms: Norms
) -> Candidates:
    """Candidates where `some` rows, which a coarse scan could not decide, are scanned again in full precision."""
    again = _near_block(queries[some], keys, bias, slack, queries.dtype, norms, table=None)
    pairs = zip(found[:4], again[:4], strict=True)
    best, codes, scores, wide = (whole.index_copy(0, some, part) for whole, part in pairs)
    counts = torch.stack([again.counts[0], found.counts[1] + again.counts[1]])
    return Candidates(best, codes, scores, wide, counts)


def _group_maxima(
    table: Rounded | None, queries: Tensor, keys: Tensor, bias: Tensor | None, scan: torch.dtype
) -> Tensor:
    """The best score in every group of codes: (n, number of groups), in the precision that the scan stores.

    Group j of a tile holds its codes j, j + TILE / GROUP, j + 2 TILE / GROUP, ...: maxima of contiguous vectors are ten
    times faster than maxima within one.

    Args:
        table: the codes in int8, for a scan in int8.
        queries, keys, bias, scan: as in `near_codes`.
    """
    tiles = math.ceil(len(keys) / TILE)
    integer = scan == torch.int8
    stored = scan if bias is None and not integer else queries.dtype  # a bias is added in full precision
    maxima = queries.new_empty(len(queries), tiles, APART, dtype=stored)
    together = min(TILE if queries.device.type == "cpu" else 16 * TILE, tiles * TILE)
    scores = queries.new_empty(len(queries), together, dtype=queries.dtype if queries.is_cuda or integer else scan)
    # Kept from tile to tile: fresh pages for its products would cost more than they do.
    integers = torch.empty(scores.numel() if integer else 0, dtype=torch.int32, device=queries.device)
    left, scales = rounded(queries, scan)
    for start in range(0, tiles * TILE, together):
        part = slice(start, start + together)
        size = len(keys[part])
        inside = scores[:, :size]
        if size < together:
            scores.fill_(-torch.inf)
        if table is not None:
            assert table.scales is not None
            products = torch._int_mm(left, table.rows[part].T, out=integers[: inside.numel()].view(inside.shape))
            if bias is None and size == TILE:
                best = products.view(len(queries), GROUP, -1).amax(1)
                torch.mul(best, table.scales[start : start + APART], out=maxima[:, start // TILE])
                continue
            inside.copy_(products).mul_(table.scales[part])  # a product of two types would make a copy first
        elif scan == inside.dtype:
            torch.mm(left, keys[part].to(scan).T, out=inside)
        else:  # on CUDA: a float32 result is also summed in float32, whatever PyTorch's settings allow
            inside.copy_(torch.mm(left, keys[part].to(scan).T, out_dtype=inside.dtype))
        if bias is None:
            shifted = scores
        elif scales is None:
            shifted = scores.to(stored)
            shifted[:, :size] += bias[part].to(stored)
        else:
            shifted = scores
            torch.addcmul(bias[part].to(stored), inside, scales[:, None], out=inside)
        written = slice(start // TILE, math.ceil((start + size) / TILE))
        grouped = shifted.view(len(queries), -1, GROUP, APART)[:, : written.stop - written.start]
        maxima[:, written] = grouped.amax(2)
    if bias is None and scales is not None:
        maxima *= scales[:, None, None]
    return maxima.flatten(1)


def _nearer(
    maxima: Tensor, rows: Tensor, groups: Tensor, slack: float, errors: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The pairs (row, group) that stay in question where each group is held to the bound of its own codes."""
    best = maxima[rows, groups]
    error = errors(rows, groups)
    lowest = maxima.new_full((len(maxima),), -torch.inf).scatter_reduce(0, rows, best - error, "amax") - slack
    keep = best + error >= lowest[rows]
    return rows[keep], groups[keep]


def _codes_of_groups(
    queries: Tensor, keys: Tensor, bias: Tensor | None, slack: float, norms: Norms, rows: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """The pairs (row, code) within the pairs (row, group) that float32 cannot tell from the best."""
    first = groups.div(APART, rounding_mode="floor") * TILE + groups % APART
    codes = first[:, None] + APART * torch.arange(GROUP, device=rows.device)  # (pairs, GROUP)
    pair, member = (codes < len(keys)).nonzero(as_tuple=True)
    rows, codes = rows[pair], codes[pair, member]
    scores = sampled_products(queries, keys, rows, codes)
    if bias is not None:
        scores += bias[codes].to(scores.dtype)
    best = scores.new_full((len(queries),), -torch.inf).scatter_reduce(0, rows, scores, "amax")
    lowest = best - slack - 2 * scan_error(queries, bias, queries.dtype, norms)
    keep = scores >= lowest[rows]
    return rows[keep], codes[keep]
