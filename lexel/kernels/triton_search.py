"""Triton kernels of the search: a scan in bfloat16 whose rows stay in shared memory, and the lists of near codes.

Deterministic: a program owns what it writes. Codes stream past rows that are read once, so that the scan runs at 560
TFLOP/s on an H100, where tiles that read both operands again for each product reach a fifth. What is left of the groups
of codes within a proven bound of the best is decided in float64, in the same kernel that lists it.
"""
# mypy: ignore-errors
# (kernels are not Python to a type checker)

import torch
import triton
import triton.language as tl
from torch import Tensor

from lexel.kernels.triton_tiles import LARGEST_DIM, PROGRAMS, operand, padded, rows_of, shapes

GROUPS = 32  # groups looked at for a row; a row with more is scanned again in full precision


@triton.jit
def _prepare_kernel(keys, half, length, residual, size, dim, K: tl.constexpr, D: tl.constexpr):
    """One program: K codes in bfloat16, their lengths, and the length of what each loses by rounding."""
    rows = tl.program_id(0) * K + tl.arange(0, K)
    squares = tl.zeros((K,), dtype=tl.float32)
    lost = tl.zeros((K,), dtype=tl.float32)
    for start in range(0, dim, D):
        columns = start + tl.arange(0, D)
        values = rows_of(keys, rows, size, columns, dim, D)
        short = values.to(tl.bfloat16)
        where = rows.to(tl.int64)[:, None] * dim + columns[None, :]
        tl.store(half + where, short, mask=(rows < size)[:, None] & (columns < dim)[None, :])
        difference = values - short.to(tl.float32)
        lost += tl.sum(difference * difference, 1)
        squares += tl.sum(values * values, 1)
    tl.store(length + rows, tl.sqrt(squares), mask=rows < size)
    tl.store(residual + rows, tl.sqrt(lost), mask=rows < size)


@triton.jit
def _bounds_kernel(
    queries, half, below, ties, longest, lost, shift, slack, count, dim, unit, tiny, N: tl.constexpr, D: tl.constexpr
):
    """One program: N rows in bfloat16, and how far from a row's best an undecided code may be: see `scan_error`."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    squares = tl.zeros((N,), dtype=tl.float32)
    short_squares = tl.zeros((N,), dtype=tl.float32)
    missing = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, dim, D):
        columns = start + tl.arange(0, D)
        values = rows_of(queries, rows, count, columns, dim, D)
        short = values.to(tl.bfloat16)
        where = rows.to(tl.int64)[:, None] * dim + columns[None, :]
        tl.store(half + where, short, mask=(rows < count)[:, None] & (columns < dim)[None, :])
        widened = short.to(tl.float32)
        squares += tl.sum(values * values, 1)
        short_squares += tl.sum(widened * widened, 1)
        missing += tl.sum((values - widened) * (values - widened), 1)
    length = tl.load(longest)
    largest = tl.sqrt(squares) * length + tl.load(shift)
    error = 1.01 * (dim + 2) * unit * largest
    error += tl.sqrt(missing) * length + tl.sqrt(short_squares) * tl.load(lost)
    tl.store(below + rows, slack + 2.02 * error, mask=rows < count)
    tl.store(ties + rows, 2.02 * (dim + 2) * tiny * largest.to(tl.float64), mask=rows < count)


@triton.jit
def _maxima_kernel(
    queries,
    keys,
    bias,
    maxima,
    count,
    size,
    dim,
    groups,
    tiles,
    all_tiles,
    BIAS: tl.constexpr,
    MEMBERS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One program: N rows, some tiles of K * MEMBERS codes; group j of a tile is j, j + K, j + 2 K, ..."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    columns = tl.arange(0, D)
    if WHOLE:
        left = rows_of(queries, rows, count, columns, dim, D)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, all_tiles)):
        best = tl.full((N, K), -float("inf"), dtype=tl.float32)
        for member in range(MEMBERS):
            cols = (tile * MEMBERS + member) * K + tl.arange(0, K)
            if WHOLE:
                right = rows_of(keys, cols, size, columns, dim, D)
                scores = tl.dot(operand(left), tl.trans(operand(right)))
            else:
                scores = tl.zeros((N, K), dtype=tl.float32)
                for start in range(0, dim, D):
                    some = rows_of(queries, rows, count, start + columns, dim, D)
                    right = rows_of(keys, cols, size, start + columns, dim, D)
                    scores += tl.dot(operand(some), tl.trans(operand(right)))
            if BIAS:
                scores += tl.load(bias + cols, mask=cols < size, other=0.0)[None, :]
            scores = tl.where((cols < size)[None, :], scores, -float("inf"))
            # A NaN must stay visible: it marks a row that the scan cannot decide.
            best = tl.where((scores > best) | (scores != scores), scores, best)
        where = rows.to(tl.int64)[:, None] * groups + tile * K + tl.arange(0, K)[None, :]
        tl.store(maxima + where, best, mask=(rows < count)[:, None])


@triton.jit
def _groups_kernel(maxima, below, listed, counts, groups, W: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the groups of one row whose maximum is within `below` of the best, ascending; W + 1 if unclear."""
    row = tl.program_id(0)
    source = maxima + row.to(tl.int64) * groups
    best = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    unclear = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, groups, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(source + place, mask=place < groups, other=-float("inf"))
        unclear |= ((values != values) | (values == float("inf"))).to(tl.int32)
        best = tl.where(values > best, values, best)
    top = tl.max(best, 0)
    lowest = top - tl.load(below + row)
    found = tl.zeros((), dtype=tl.int32)
    for start in range(0, groups, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(source + place, mask=place < groups, other=-float("inf"))
        near = ((values >= lowest) & (place < groups)).to(tl.int32)
        slot = found + tl.cumsum(near, 0) - near
        tl.store(listed + row * W + slot, place, mask=(near > 0) & (slot < W))
        found += tl.sum(near, 0)
    clear = (tl.max(unclear, 0) == 0) & (lowest > -float("inf")) & (lowest < float("inf"))
    tl.store(counts + row, tl.where(clear, found, W + 1))


@triton.jit
def _list_kernel(
    queries,
    keys,
    bias,
    ties,
    listed,
    counts,
    scores,
    near,
    near_scores,
    best,
    wide,
    totals,
    slack,
    size,
    dim,
    BIAS: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    PER_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """One program: one row's scores in float64 against the codes of its groups, and the list of those near the best."""
    row = tl.program_id(0)
    count = tl.load(counts + row)
    groups = tl.where(count > W, 0, count)
    own = scores + row.to(tl.int64) * (W * GROUP)
    for number in range(groups):
        group = tl.load(listed + row * W + number)
        members = (group // PER_TILE) * (PER_TILE * GROUP) + group % PER_TILE + PER_TILE * tl.arange(0, GROUP)
        total = tl.zeros((GROUP,), dtype=tl.float64)
        for start in range(0, dim, D):
            columns = start + tl.arange(0, D)
            query = tl.load(queries + row.to(tl.int64) * dim + columns, mask=columns < dim, other=0.0).to(tl.float64)
            values = rows_of(keys, members, size, columns, dim, D).to(tl.float64)
            total += tl.sum(query[None, :] * values, 1)
        if BIAS:
            total += tl.load(bias + members, mask=members < size, other=0.0)
        tl.store(own + number * GROUP + tl.arange(0, GROUP), tl.where(members < size, total, -float("inf")))
    tl.debug_barrier()  # the scores are read by other threads than wrote them

    slot = tl.arange(0, W * GROUP)
    there = slot < groups * GROUP
    found = tl.load(own + slot, mask=there, other=-float("inf"))
    group = tl.load(listed + row * W + slot // GROUP, mask=there, other=0)
    code = (group // PER_TILE) * (PER_TILE * GROUP) + group % PER_TILE + PER_TILE * (slot % GROUP)
    top = tl.max(found, 0)
    tied = tl.load(ties + row)
    keep = (found >= top - slack - tied) & (found > -float("inf")) & (found < float("inf"))
    kept = tl.sum(keep.to(tl.int32), 0)
    broad = (kept > WIDTH) | (count > W)
    none = 0x7FFFFFFFFFFFFFFF
    order = tl.where(keep & (broad == 0), code.to(tl.int64) * 1024 + slot, none)
    place = row.to(tl.int64) * WIDTH
    chosen = tl.where(broad, 0, kept)
    rest = tl.arange(0, WIDTH)
    tl.store(near + place + rest, tl.zeros((WIDTH,), dtype=tl.int64), mask=rest >= chosen)
    tl.store(near_scores + place + rest, tl.full((WIDTH,), -float("inf"), dtype=tl.float64), mask=rest >= chosen)
    last = tl.full((), -1, dtype=tl.int64)
    for number in range(chosen):  # one or two, ascending
        last = tl.min(tl.where(order > last, order, none), 0)
        tl.store(near + place + number, last // 1024)
        tl.store(near_scores + place + number, tl.load(own + last % 1024))
    first = tl.min(tl.where(keep & (found >= top - tied), code.to(tl.int64), none), 0)
    tl.store(best + row, tl.where(broad | (first == none), 0, first))
    tl.store(wide + row, broad.to(tl.int8))
    tl.atomic_add(totals, broad.to(tl.int64))
    tl.atomic_add(totals + 1, chosen.to(tl.int64))


def prepare(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes (K, D) in bfloat16, their lengths (K,), and the lengths of what they lose by rounding (K,)."""
    keys = keys.contiguous()
    half, lengths = torch.empty_like(keys, dtype=torch.bfloat16), keys.new_empty(len(keys))
    residuals = torch.empty_like(lengths)
    block = min(LARGEST_DIM, padded(keys.shape[1]))
    _prepare_kernel[(triton.cdiv(len(keys), 32),)](
        keys, half, lengths, residuals, *keys.shape, K=32, D=block, num_warps=4
    )
    return half, lengths, residuals


def group_maxima(queries: Tensor, keys: Tensor, bias: Tensor | None, members: int, per_tile: int) -> Tensor:
    """As `search._group_maxima`, in float32 from bfloat16 rows: (N, ceil(K / (members * per_tile)) * per_tile)."""
    all_tiles = triton.cdiv(len(keys), members * per_tile)
    maxima = torch.empty(len(queries), all_tiles * per_tile, device=queries.device)
    cut = shapes(queries.device).scan
    dim = queries.shape[1]
    whole = dim <= LARGEST_DIM
    blocks = triton.cdiv(len(queries), cut.rows)
    tiles = max(1, min(16, all_tiles * blocks // PROGRAMS))
    _maxima_kernel[(blocks, triton.cdiv(all_tiles, tiles))](
        queries,
        keys,
        maxima if bias is None else bias.float(),
        maxima,
        len(queries),
        len(keys),
        dim,
        all_tiles * per_tile,
        tiles,
        all_tiles,
        BIAS=bias is not None,
        MEMBERS=members,
        N=cut.rows,
        K=per_tile,
        D=padded(dim) if whole else 64,
        WHOLE=whole,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return maxima


def near_groups(maxima: Tensor, below: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The groups within `below` (N,) of each row's best: (N, width) int32, and how many there are: (N,) int32.

    A row that the scan cannot decide (a NaN, an infinity) has width + 1.
    """
    n, groups = maxima.shape
    listed = torch.empty(n, width, dtype=torch.int32, device=maxima.device)
    counts = torch.empty(n, dtype=torch.int32, device=maxima.device)
    block = min(2048, max(16, triton.next_power_of_2(groups)))
    _groups_kernel[(n,)](maxima, below, listed, counts, groups, W=width, BLOCK=block, num_warps=4)
    return listed, counts


def bounds(
    queries: Tensor, longest: Tensor, lost: Tensor, shift: Tensor, slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, D) in bfloat16, how far below a row's best the scan may put a near code (N,), and ties' width (N,).

    Args:
        queries: float32.
        longest, lost, shift: the largest length of a code, of what one loses by rounding, and of a bias: () each.
        slack: as in `search.near_codes`.
    """
    n, dim = queries.shape
    half, below = torch.empty_like(queries, dtype=torch.bfloat16), queries.new_empty(n)
    ties = torch.empty(n, dtype=torch.float64, device=queries.device)
    _bounds_kernel[(triton.cdiv(n, 16),)](
        queries,
        half,
        below,
        ties,
        longest,
        lost,
        shift,
        slack,
        n,
        dim,
        torch.finfo(torch.float32).eps / 2,
        torch.finfo(torch.float64).eps / 2,
        N=16,
        D=min(LARGEST_DIM, padded(dim)),
        num_warps=4,
    )
    return half, below, ties


def list_codes(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    ties: Tensor,
    listed: Tensor,
    counts: Tensor,
    slack: float,
    group: int,
    per_tile: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `search.Candidates` from the groups that `near_groups` lists; the last one is on the device."""
    n, most = listed.shape
    device = queries.device
    scores = torch.empty(n, most * group, dtype=torch.float64, device=device)
    near = torch.empty(n, width, dtype=torch.int64, device=device)
    near_scores = torch.empty(n, width, dtype=torch.float64, device=device)
    best = torch.empty(n, dtype=torch.int64, device=device)
    wide = torch.empty(n, dtype=torch.int8, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    _list_kernel[(n,)](
        queries,
        keys,
        scores if bias is None else bias,
        ties,
        listed,
        counts,
        scores,
        near,
        near_scores,
        best,
        wide,
        totals,
        slack,
        *keys.shape,
        BIAS=bias is not None,
        W=most,
        GROUP=group,
        PER_TILE=per_tile,
        WIDTH=width,
        D=min(LARGEST_DIM, padded(keys.shape[1])),
        num_warps=4,
    )
    return best, near, near_scores, wide.bool(), totals


def near_codes(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    slack: float,
    prepared: tuple[Tensor, Tensor, Tensor],
    group: int,
    per_tile: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `search.Candidates`, with one wait for the device.

    Args:
        queries, keys, bias, slack: as in `search.near_codes`.
        prepared: of `prepare`, with the largest length of a code, and of what one loses by rounding.
        group, per_tile, width: codes that share a maximum, groups in a tile, codes in a list.
    """
    low, longest, lost = prepared
    shift = longest.new_zeros(()) if bias is None else bias.abs().amax().to(longest.dtype)
    short, below, ties = bounds(queries, longest, lost, shift, slack)
    maxima = group_maxima(short, low, bias, group, per_tile)
    listed, found = near_groups(maxima, below, GROUPS)
    *fields, totals = list_codes(queries, keys, bias, ties, listed, found, slack, group, per_tile, width)
    return *fields, totals.cpu()
