"""Triton kernels of the gradient through the softmax, with products of bfloat16 numbers summed in float32.

Deterministic: a program owns what it writes, and partial results of splits are added in a fixed order. Six products, in
exchange for no tensor of N x K: two for the statistics of a row (its maximum, sum of exponentials and mean of S), two
for dL, which is written in bfloat16 for some codes at a time, and two that the matrix library makes of it. The
statistics come from the very numbers that dL is made of, so that S - sum p S cancels for a saturated softmax as exactly
as the rounding of dL allows. Rows stay in shared memory while codes stream past: 650 TFLOP/s on an H100.
"""
# mypy: ignore-errors
# (kernels are not Python to a type checker)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lexel.kernels.inputs import Inputs
from lexel.kernels.triton_search import prepare
from lexel.kernels.triton_tiles import PROGRAMS, Tiles, operand, padded, rows_of, shapes

LOG2_E = tl.constexpr(1.4426950408889634)
HELD = 2**27  # numbers of dL at a time: 256 MiB


@triton.jit
def _logits(left, right, bias, cols, size, scale, BIAS: tl.constexpr):
    """Logits over the temperature, in powers of two; -inf beyond the last code: (N, K)."""
    logits = tl.dot(operand(left), tl.trans(operand(right)))
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
    left = rows_of(queries, rows, count, columns, dim, D)
    above = rows_of(g, rows, count, columns, dim, D)
    largest = tl.full((N,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((N,), dtype=tl.float32)
    weighted = tl.zeros((N,), dtype=tl.float32)
    for tile in range(tiles):
        cols = (split * tiles + tile) * K + tl.arange(0, K)
        right = rows_of(keys, cols, size, columns, dim, D)
        logits = _logits(left, right, bias, cols, size, scale, BIAS)
        if not SAME:
            right = rows_of(codes, cols, size, columns, dim, D)
        s = tl.dot(operand(above), tl.trans(operand(right)))
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
    left = rows_of(queries, rows, count, columns, dim, D)
    above = rows_of(g, rows, count, columns, dim, D)
    peak = tl.load(maximum + rows, mask=inside, other=0.0)
    share = scale / tl.load(total + rows, mask=inside, other=1.0)
    delta = tl.load(mean + rows, mask=inside, other=0.0)
    for tile in range(tiles):
        place = (tl.program_id(1) * tiles + tile) * K + tl.arange(0, K)
        cols = first + place
        right = rows_of(keys, cols, size, columns, dim, D)
        logits = _logits(left, right, bias, cols, size, scale, BIAS)
        if not SAME:
            right = rows_of(codes, cols, size, columns, dim, D)
        s = tl.dot(operand(above), tl.trans(operand(right)))
        dl = tl.exp2(logits - peak[:, None]) * share[:, None] * (s - delta[:, None])
        if BULK:  # a third faster: the copy engine takes a tile away while the next one is computed
            out.store([tl.program_id(0) * N, (tl.program_id(1) * tiles + tile) * K], dl.to(tl.bfloat16))
        else:
            where = rows.to(tl.int64)[:, None] * stride + place[None, :]
            tl.store(out + where, dl.to(tl.bfloat16), mask=inside[:, None] & (place < width)[None, :])


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
    options = {"BIAS": bias is not None, "SAME": inputs.codes is None, "D": padded(dim)}

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
            *arguments, target, n, size, dim, scale, first, width, stride, each, **options, BULK=bulk, **_cut(cut.slope)
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
