"""Triton kernels for the two large parts: the scan for the best code, and the gradient through the softmax.

All kernels are deterministic: a program owns what it writes, partial results of splits are added in a fixed order, and
tuning changes warps and stages only, never the order of a sum. Tiles are 64 x 64 with products accumulated over 32
numbers of D at a time (16 KiB of shared memory a stage at float32), so that every D up to 1,024 fits any card.

The backward pass makes eight products where the plain tiles make four, in exchange for no buffer of rows x K: two for
the statistics of a row (its maximum, sum of exponentials and mean of S), three each for the gradients of queries and
keys. The statistics come from the very numbers that the other two kernels multiply, so that S - sum p S cancels
exactly for a saturated softmax.
"""
# mypy: ignore-errors
# (kernels are not Python to a type checker)

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from lexel.kernels.inputs import Inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter would multiply the bits of bfloat16 numbers, not the numbers
PRECISION = "tf32x3"  # three tensor-core products for one: about float32's precision
BLOCK_N, BLOCK_K, BLOCK_D = 64, 64, 32
OUTPUT = 256  # columns of a gradient that one program holds in registers
PROGRAMS = 264  # enough to fill a large card twice

CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (2, 3)]
tuned = triton.autotune(CONFIGS[:1] if INTERPRETED else CONFIGS, key=["size", "dim"])


@triton.jit
def _products(
    a,
    b,
    a_rows,
    b_rows,
    a_count,
    b_count,
    dim,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
):
    """a[a_rows] @ b[b_rows].T, zero where a row is out of range: (N, K)."""
    total = tl.zeros((N, K), dtype=tl.float32)
    for start in range(0, dim, D):
        columns = start + tl.arange(0, D)
        a_inside = (a_rows < a_count)[:, None] & (columns < dim)[None, :]
        b_inside = (b_rows < b_count)[:, None] & (columns < dim)[None, :]
        left = tl.load(a + a_rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=a_inside, other=0.0)
        right = tl.load(b + b_rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=b_inside, other=0.0)
        if HALF:
            left, right = left.to(tl.bfloat16), right.to(tl.bfloat16)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total += tl.dot(left, tl.trans(right))
        else:
            total += tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return total


@triton.jit
def _logits(
    queries,
    keys,
    bias,
    rows,
    cols,
    count,
    size,
    dim,
    scale,
    BIAS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits over the temperature; -inf beyond the last code: (N, K)."""
    logits = _products(queries, keys, rows, cols, count, size, dim, N, K, D, PRECISION, False)
    if BIAS:
        logits += tl.load(bias + cols, mask=cols < size, other=0.0)[None, :]
    return tl.where((cols < size)[None, :], logits * scale, -float("inf"))


@tuned
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
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    MEMBERS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    """One program: N rows, one tile of K * MEMBERS codes; group j of the tile is j, j + K, j + 2 K, ..."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    tile = tl.program_id(1)
    best = tl.full((N, K), -float("inf"), dtype=tl.float32)
    for member in range(MEMBERS):
        cols = (tile * MEMBERS + member) * K + tl.arange(0, K)
        scores = _products(queries, keys, rows, cols, count, size, dim, N, K, D, PRECISION, HALF)
        if BIAS:
            scores += tl.load(bias + cols, mask=cols < size, other=0.0)[None, :]
        scores = tl.where((cols < size)[None, :], scores, -float("inf"))
        # A NaN must stay visible: it marks a row that the scan cannot decide.
        best = tl.where((scores > best) | (scores != scores), scores, best)
    where = rows.to(tl.int64)[:, None] * groups + tile * K + tl.arange(0, K)[None, :]
    tl.store(maxima + where, best, mask=(rows < count)[:, None])


@tuned
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
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    """One program: N rows against one split of the codes; the running maximum, sum exp and sum exp S of each row."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(1)
    largest = tl.full((N,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((N,), dtype=tl.float32)
    weighted = tl.zeros((N,), dtype=tl.float32)
    for tile in range(tiles):
        cols = (split * tiles + tile) * K + tl.arange(0, K)
        logits = _logits(queries, keys, bias, rows, cols, count, size, dim, scale, BIAS, N, K, D, PRECISION)
        s = _products(g, codes, rows, cols, count, size, dim, N, K, D, PRECISION, False)
        peak = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(peak == -float("inf"), 0.0, peak)  # a split may hold no code at all
        shrink = tl.exp(largest - base)
        p = tl.exp(logits - base[:, None])
        mass = mass * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * s, 1)
        largest = peak
    inside = rows < count
    tl.store(maximum + split * count + rows, largest, mask=inside)
    tl.store(total + split * count + rows, mass, mask=inside)
    tl.store(mean + split * count + rows, weighted, mask=inside)


@triton.jit
def _dl(
    queries,
    keys,
    codes,
    bias,
    g,
    maximum,
    total,
    mean,
    rows,
    cols,
    count,
    size,
    dim,
    scale,
    BIAS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the logits: p (S - sum p S) / T, zero for rows and codes out of range: (N, K)."""
    inside = rows < count
    logits = _logits(queries, keys, bias, rows, cols, count, size, dim, scale, BIAS, N, K, D, PRECISION)
    s = _products(g, codes, rows, cols, count, size, dim, N, K, D, PRECISION, False)
    peak = tl.load(maximum + rows, mask=inside, other=0.0)
    mass = tl.load(total + rows, mask=inside, other=1.0)
    delta = tl.load(mean + rows, mask=inside, other=0.0)
    p = tl.exp(logits - peak[:, None]) / mass[:, None]
    return tl.where(inside[:, None], p * (s - delta[:, None]) * scale, 0.0)


@tuned
@triton.jit
def _queries_kernel(
    queries,
    keys,
    codes,
    bias,
    g,
    maximum,
    total,
    mean,
    gradient,
    count,
    size,
    dim,
    scale,
    tiles,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
):
    """One program: dL @ keys for N rows, one split of the codes and OUT columns."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(1)
    columns = tl.program_id(2) * OUT + tl.arange(0, OUT)
    result = tl.zeros((N, OUT), dtype=tl.float32)
    for tile in range(tiles):
        cols = (split * tiles + tile) * K + tl.arange(0, K)
        dl = _dl(
            queries,
            keys,
            codes,
            bias,
            g,
            maximum,
            total,
            mean,
            rows,
            cols,
            count,
            size,
            dim,
            scale,
            BIAS,
            N,
            K,
            D,
            PRECISION,
        )
        inside = (cols < size)[:, None] & (columns < dim)[None, :]
        values = tl.load(keys + cols.to(tl.int64)[:, None] * dim + columns[None, :], mask=inside, other=0.0)
        result += tl.dot(dl, values, input_precision=PRECISION)
    where = (split * count + rows).to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(gradient + where, result, mask=(rows < count)[:, None] & (columns < dim)[None, :])


@tuned
@triton.jit
def _keys_kernel(
    queries,
    keys,
    codes,
    bias,
    g,
    maximum,
    total,
    mean,
    gradient,
    sums,
    count,
    size,
    dim,
    scale,
    blocks,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
):
    """One program: dL.T @ queries for K codes and OUT columns, over all rows; and the sum of dL."""
    cols = tl.program_id(0) * K + tl.arange(0, K)
    columns = tl.program_id(1) * OUT + tl.arange(0, OUT)
    result = tl.zeros((K, OUT), dtype=tl.float32)
    mass = tl.zeros((K,), dtype=tl.float32)
    for block in range(blocks):
        rows = block * N + tl.arange(0, N)
        dl = _dl(
            queries,
            keys,
            codes,
            bias,
            g,
            maximum,
            total,
            mean,
            rows,
            cols,
            count,
            size,
            dim,
            scale,
            BIAS,
            N,
            K,
            D,
            PRECISION,
        )
        inside = (rows < count)[:, None] & (columns < dim)[None, :]
        values = tl.load(queries + rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=inside, other=0.0)
        result += tl.dot(tl.trans(dl), values, input_precision=PRECISION)
        mass += tl.sum(dl, 0)
    where = cols.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(gradient + where, result, mask=(cols < size)[:, None] & (columns < dim)[None, :])
    if tl.program_id(1) == 0:
        tl.store(sums + cols, mass, mask=cols < size)


def group_maxima(queries: Tensor, keys: Tensor, bias: Tensor | None, half: bool, members: int, per_tile: int) -> Tensor:
    """As `search._group_maxima`, in float32: (N, ceil(K / (members * per_tile)) * per_tile)."""
    queries, keys = queries.contiguous(), keys.contiguous()
    tiles = triton.cdiv(len(keys), members * per_tile)
    maxima = queries.new_empty(len(queries), tiles * per_tile)
    _maxima_kernel[(triton.cdiv(len(queries), BLOCK_N), tiles)](
        queries,
        keys,
        queries if bias is None else bias.to(queries.dtype),
        maxima,
        len(queries),
        len(keys),
        keys.shape[1],
        tiles * per_tile,
        BIAS=bias is not None,
        HALF=half,
        PRECISION="ieee",
        MEMBERS=members,
        N=BLOCK_N,
        K=per_tile,
        D=BLOCK_D,
    )
    return maxima


def soft(inputs: Inputs, g: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the softmax of the straight-through one-hot: queries' (N, D), keys' (K, D), and sum dL (K,)."""
    queries, keys, g = inputs.queries.contiguous(), inputs.keys.contiguous(), g.contiguous()
    codes = keys if inputs.codes is None else inputs.codes.contiguous()
    n, size, dim = len(queries), len(keys), keys.shape[1]
    scale = 1 / inputs.temperature
    shift = queries if bias is None else bias.to(queries.dtype)
    blocks, tiles = triton.cdiv(n, BLOCK_N), triton.cdiv(size, BLOCK_K)
    splits = max(1, min(8, math.ceil(PROGRAMS / blocks), tiles))
    tiles = triton.cdiv(tiles, splits)  # in one split
    options = {"BIAS": bias is not None, "PRECISION": PRECISION, "N": BLOCK_N, "K": BLOCK_K, "D": BLOCK_D}
    out = min(OUTPUT, max(16, triton.next_power_of_2(dim)))
    chunks = triton.cdiv(dim, out)

    partial = [queries.new_empty(splits, n) for _ in range(3)]
    _statistics_kernel[(blocks, splits)](
        queries, keys, codes, shift, g, *partial, n, size, dim, scale, tiles, **options
    )
    maximum = partial[0].amax(0)
    weights = (partial[0] - maximum).exp()
    total = (partial[1] * weights).sum(0)
    mean = (partial[2] * weights).sum(0) / total

    arguments = (queries, keys, codes, shift, g, maximum, total, mean)
    d_queries = queries.new_empty(splits, n, dim)
    _queries_kernel[(blocks, splits, chunks)](*arguments, d_queries, n, size, dim, scale, tiles, **options, OUT=out)
    d_keys, mass = torch.empty_like(keys), queries.new_empty(size)
    _keys_kernel[(triton.cdiv(size, BLOCK_K), chunks)](
        *arguments, d_keys, mass, n, size, dim, scale, blocks, **options, OUT=out
    )
    return d_queries.sum(0), d_keys, mass
