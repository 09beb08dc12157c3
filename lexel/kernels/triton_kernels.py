"""Triton kernels for a GPU: the scan for the best code, the lists of near codes, and the gradient's products in bf16.

All kernels are deterministic: a program owns what it writes, and partial results of splits are added in a fixed order.
Rows stay in shared memory while codes stream past, so that a product reads its operands once: on an H100 the scan runs
at 560 and the statistics at 650 TFLOP/s, where tiles that read both operands again for each product reach a fifth.

The backward pass makes six products beside the scan, in exchange for no tensor of N x K: two for the statistics of a
row (its maximum, sum of exponentials and mean of S), two for dL, which is written in bfloat16 for some codes at a time,
and two that the matrix library makes of it. The statistics come from the very numbers that dL is made of, so that
S - sum p S cancels for a saturated softmax as exactly as the rounding of dL allows.
"""
# mypy: ignore-errors
# (kernels are not Python to a type checker)

import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lexel.kernels.inputs import Inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter would multiply the bits of bfloat16 numbers, not the numbers
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_DIM = 256  # numbers of a row that stay in shared memory; longer rows take the way of plain tiles
PROGRAMS = 264  # enough to fill a large card twice
HELD = 2**27  # numbers of dL at a time: 256 MiB


class Tiles(NamedTuple):
    """How a kernel is cut: rows that stay, codes that stream past, and how Triton compiles it."""

    rows: int
    codes: int
    warps: int
    stages: int


class Shapes(NamedTuple):
    """The tiles of each kernel. They decide time and nothing else, but for the order of sums over codes."""

    scan: Tiles
    statistics: Tiles
    slope: Tiles


# By KiB of shared memory that a block may take; the first was the fastest of those tried on an H100.
SHAPES = {
    227: Shapes(Tiles(128, 64, 8, 4), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
    163: Shapes(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    99: Shapes(Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 1), Tiles(32, 64, 4, 1)),
}


def shapes(device: torch.device, several: bool = False) -> Shapes:
    """The tiles for a device.

    Args:
        several: whether two tables of codes stream past, which takes twice the room.
    """
    most = 227 if device.type != "cuda" else torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    most = most // 1024 if most > 1024 else most
    sizes = [size for size in SHAPES if size <= most]
    if not sizes:
        return SHAPES[min(SHAPES)]
    if several and len(sizes) > 1:
        return SHAPES[sizes[1]]
    return SHAPES[sizes[0]]


@triton.jit
def _half(x):
    """bfloat16 operands of a product."""
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _rows_of(table, rows, count, columns, dim, D: tl.constexpr):
    """table[rows, :D], zero where a row or column is out of range."""
    inside = (rows < count)[:, None] & (columns < dim)[None, :]
    return tl.load(table + rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _prepare_kernel(keys, half, length, residual, size, dim, K: tl.constexpr, D: tl.constexpr):
    """One program: K codes in bfloat16, their lengths, and the length of what each loses by rounding."""
    rows = tl.program_id(0) * K + tl.arange(0, K)
    squares = tl.zeros((K,), dtype=tl.float32)
    lost = tl.zeros((K,), dtype=tl.float32)
    for start in range(0, dim, D):
        columns = start + tl.arange(0, D)
        values = _rows_of(keys, rows, size, columns, dim, D)
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
    queries,
    half,
    below,
    ties,
    longest,
    lost,
    shift,
    slack,
    count,
    dim,
    unit,
    tiny,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """One program: N rows in bfloat16, and how far from a row's best an undecided code may be: see `scan_error`."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    squares = tl.zeros((N,), dtype=tl.float32)
    short_squares = tl.zeros((N,), dtype=tl.float32)
    missing = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, dim, D):
        columns = start + tl.arange(0, D)
        values = _rows_of(queries, rows, count, columns, dim, D)
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
        left = _rows_of(queries, rows, count, columns, dim, D)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, all_tiles)):
        best = tl.full((N, K), -float("inf"), dtype=tl.float32)
        for member in range(MEMBERS):
            cols = (tile * MEMBERS + member) * K + tl.arange(0, K)
            if WHOLE:
                right = _rows_of(keys, cols, size, columns, dim, D)
                scores = tl.dot(_half(left), tl.trans(_half(right)))
            else:
                scores = tl.zeros((N, K), dtype=tl.float32)
                for start in range(0, dim, D):
                    some = _rows_of(queries, rows, count, start + columns, dim, D)
                    right = _rows_of(keys, cols, size, start + columns, dim, D)
                    scores += tl.dot(_half(some), tl.trans(_half(right)))
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
            values = _rows_of(keys, members, size, columns, dim, D).to(tl.float64)
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


@triton.jit
def _logits(left, right, bias, cols, size, scale, BIAS: tl.constexpr):
    """Logits over the temperature, in powers of two; -inf beyond the last code: (N, K)."""
    logits = tl.dot(_half(left), tl.trans(_half(right)))
    if BIAS:
        logits += tl.load(bias + cols, mask=cols < size, other=0.0)[None, :]
    return tl.where((cols < size)[None, :], logits * (scale * LOG2_E), -float("inf"))


@triton.jit
def _statistics_kernel(
    queries,
    keys,
    codes,
    bias,
    g,
    maximum,
    total,
    mean,
    count,
    size,
    dim,
    scale,
    tiles,
    BIAS: tl.constexpr,
    SAME: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    """One program: N rows against one split of the codes; the maximum, sum exp and sum exp S of each row."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    columns = tl.arange(0, D)
    split = tl.program_id(1)
    left = _rows_of(queries, rows, count, columns, dim, D)
    above = _rows_of(g, rows, count, columns, dim, D)
    largest = tl.full((N,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((N,), dtype=tl.float32)
    weighted = tl.zeros((N,), dtype=tl.float32)
    for tile in range(tiles):
        cols = (split * tiles + tile) * K + tl.arange(0, K)
        right = _rows_of(keys, cols, size, columns, dim, D)
        logits = _logits(left, right, bias, cols, size, scale, BIAS)
        if not SAME:
            right = _rows_of(codes, cols, size, columns, dim, D)
        s = tl.dot(_half(above), tl.trans(_half(right)))
        peak = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(peak == -float("inf"), 0.0, peak)  # a split may hold no code at all
        shrink = tl.exp2(largest - base)
        p = tl.exp2(logits - base[:, None])
        mass = mass * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * s, 1)
        largest = peak
    inside = rows < count
    tl.store(maximum + split * count + rows, largest, mask=inside)
    tl.store(total + split * count + rows, mass, mask=inside)
    tl.store(mean + split * count + rows, weighted, mask=inside)


@triton.jit
def _slope_kernel(
    queries,
    keys,
    codes,
    bias,
    g,
    maximum,
    total,
    mean,
    out,
    count,
    size,
    dim,
    scale,
    first,
    width,
    stride,
    tiles,
    BIAS: tl.constexpr,
    SAME: tl.constexpr,
    BULK: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    """One program: dL = p (S - sum p S) / T in bfloat16 for N rows and some tiles of codes, from code `first` on."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    columns = tl.arange(0, D)
    inside = rows < count
    left = _rows_of(queries, rows, count, columns, dim, D)
    above = _rows_of(g, rows, count, columns, dim, D)
    peak = tl.load(maximum + rows, mask=inside, other=0.0)
    share = scale / tl.load(total + rows, mask=inside, other=1.0)
    delta = tl.load(mean + rows, mask=inside, other=0.0)
    for tile in range(tiles):
        place = (tl.program_id(1) * tiles + tile) * K + tl.arange(0, K)
        cols = first + place
        right = _rows_of(keys, cols, size, columns, dim, D)
        logits = _logits(left, right, bias, cols, size, scale, BIAS)
        if not SAME:
            right = _rows_of(codes, cols, size, columns, dim, D)
        s = tl.dot(_half(above), tl.trans(_half(right)))
        dl = tl.exp2(logits - peak[:, None]) * share[:, None] * (s - delta[:, None])
        if BULK:  # a third faster: the copy engine takes a tile away while the next one is computed
            out.store([tl.program_id(0) * N, (tl.program_id(1) * tiles + tile) * K], dl.to(tl.bfloat16))
        else:
            where = rows.to(tl.int64)[:, None] * stride + place[None, :]
            tl.store(out + where, dl.to(tl.bfloat16), mask=inside[:, None] & (place < width)[None, :])


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def prepare(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes (K, D) in bfloat16, their lengths (K,), and the lengths of what they lose by rounding (K,)."""
    keys = keys.contiguous()
    half, lengths = torch.empty_like(keys, dtype=torch.bfloat16), keys.new_empty(len(keys))
    residuals = torch.empty_like(lengths)
    block = min(LARGEST_DIM, _padded(keys.shape[1]))
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
        D=_padded(dim) if whole else 64,
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
        D=min(LARGEST_DIM, _padded(dim)),
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
        D=min(LARGEST_DIM, _padded(keys.shape[1])),
        num_warps=4,
    )
    return best, near, near_scores, wide.bool(), totals


def soft(inputs: Inputs, g: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the softmax of the straight-through one-hot: queries' (N, D), keys' (K, D), and sum dL (K,).

    Products of bfloat16 numbers, summed in float32.
    """
    queries, g = inputs.queries.to(torch.bfloat16).contiguous(), g.to(torch.bfloat16).contiguous()
    keys = prepare(inputs.keys)[0]
    codes = keys if inputs.codes is None else prepare(inputs.codes)[0]
    n, size, dim = len(queries), len(keys), keys.shape[1]
    scale = 1 / inputs.temperature
    cut = shapes(queries.device, several=inputs.codes is not None)
    shift = queries if bias is None else bias.float()
    options = {"BIAS": bias is not None, "SAME": inputs.codes is None, "D": _padded(dim)}

    blocks, tiles = triton.cdiv(n, cut.statistics.rows), triton.cdiv(size, cut.statistics.codes)
    splits = max(1, min(math.ceil(PROGRAMS / blocks), tiles))
    tiles = triton.cdiv(tiles, splits)  # in one split
    partial = [torch.empty(splits, n, device=queries.device) for _ in range(3)]
    _statistics_kernel[(blocks, splits)](
        queries, keys, codes, shift, g, *partial, n, size, dim, scale, tiles, **options, **_cut(cut.statistics)
    )
    maximum = partial[0].amax(0)
    weights = (partial[0] - maximum).exp2()
    total = (partial[1] * weights).sum(0)
    mean = (partial[2] * weights).sum(0) / total

    arguments = (queries, keys, codes, shift, g, maximum, total, mean)
    d_queries, d_keys = torch.zeros(n, dim, device=queries.device), torch.empty(size, dim, device=queries.device)
    mass = torch.zeros(size, device=queries.device)
    held = min(size, max(1024, HELD // n // 1024 * 1024))
    stride = triton.cdiv(held, 64) * 64
    out = torch.empty(n, stride, dtype=torch.bfloat16, device=queries.device)
    bulk = queries.is_cuda and torch.cuda.get_device_capability(queries.device) >= (9, 0)
    target = TensorDescriptor.from_tensor(out, [cut.slope.rows, cut.slope.codes]) if bulk else out
    blocks = triton.cdiv(n, cut.slope.rows)
    for first in range(0, size, held):
        width = min(held, size - first)
        tiles = triton.cdiv(width, cut.slope.codes)
        each = max(1, min(8, tiles * blocks // PROGRAMS))
        _slope_kernel[(blocks, triton.cdiv(tiles, each))](
            *arguments,
            target,
            n,
            size,
            dim,
            scale,
            first,
            width,
            stride,
            each,
            **options,
            BULK=bulk,
            **_cut(cut.slope),
        )
        dl, part = out[:, :width], slice(first, first + width)
        d_queries += _product(dl, keys[part])
        d_keys[part] = _product(dl.T, queries)
        if inputs.distance:
            torch.sum(dl, 0, dtype=torch.float32, out=mass[part])
    return d_queries, d_keys, mass


def _cut(tiles: Tiles) -> dict[str, int]:
    return {"N": tiles.rows, "K": tiles.codes, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bfloat16 numbers, summed and returned in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
