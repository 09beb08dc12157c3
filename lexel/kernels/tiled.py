"""Index backpropagation in tiles of plain PyTorch, for any device: memory O((N + K) D), five matrix products.

With logits L = queries @ keys.T (- |keys|^2 for distances), p = softmax(L / T), g the gradient that reaches z_q and
S = g @ codes.T:

    dL        = p (S - sum_k p S) / T                       through the straight-through one-hot
    dqueries  = dL @ keys,   dkeys = dL.T @ queries  (- 2 keys sum_n dL for distances)
    dcodes    = g, added to the chosen rows                 the output itself is hard: no product

The backward pass takes some rows at a time against all codes, so that the softmax is normalised over the very numbers
that are multiplied: the exact cancellation in S - sum p S survives float32.

The entropies use q = softmax(L / tau) with a small tau, which multiplies rounding errors by 1 / tau. Codes further
than tau (log K + CUT) below a row's best hold less than exp(-CUT) of its mass together; they are dropped, and the rest,
mostly one or two codes, is done in float64. Rows with more than `search.WIDTH` such codes are broad: they are done
against all codes, in float64 where tau is the smaller temperature.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.kernels.oracle import EPS
from lexel.kernels.problem import Problem
from lexel.kernels.search import TILE, minus_squares, near_codes

# exp(-CUT) bounds the probability mass that a row's entropies may lose.
CUT = {torch.float32: 28.0, torch.float64: 46.0}
# p is kept above exp(-FLOOR) of a row's largest, at most K exp(-40) of mass: denormal numbers slow a CPU down.
FLOOR = 40.0


class Found(NamedTuple):
    """What the forward pass finds; the last four are empty without entropies."""

    indices: Tensor  # (N,) int64
    sample: Tensor  # () mean entropy of the rows
    batch: Tensor  # () entropy of the mean row
    near: Tensor  # (N, WIDTH) int64, the codes that hold a row's mass at the entropy temperature
    q: Tensor  # (N, WIDTH) float64, their probabilities; 0 where there are fewer
    mean: Tensor  # (K,) float64, the mean of q over the rows
    broad: Tensor  # (N,) bool, rows that have no such list


class Gradients(NamedTuple):
    """Gradients of the inputs; `codes` is empty where the keys are the codes."""

    queries: Tensor
    keys: Tensor
    codes: Tensor


def rows_at_a_time(size: int, cuda: bool) -> int:
    """How many rows the backward pass takes at a time by default."""
    most, budget = (4096, 2**28) if cuda else (384, 2**25)
    return max(16, min(most, budget // size))


def forward(problem: Problem, implementation: str = "tiled") -> Found:
    """Indices and entropies; `implementation` is that of the scan."""
    queries, keys, bias, tau = problem.queries, problem.keys, _bias(problem), problem.entropy_temperature
    slack = tau * (math.log(len(keys)) + CUT[queries.dtype]) if problem.entropy else 0.0
    near = near_codes(queries, keys, bias, slack, implementation=implementation)
    if not problem.entropy:
        scalar, empty = queries.new_zeros(()), queries.new_empty(0, dtype=torch.float64)
        return Found(near.best, scalar, scalar.clone(), near.codes[:0].clone(), empty, empty.clone(), near.broad[:0])

    # A broad row's list is empty, and its softmax is no number: it takes part below.
    q = (near.scores / tau).softmax(1).masked_fill(near.broad[:, None], 0.0)
    entropies = -torch.special.xlogy(q, q).sum(1)
    mean = add_rows(q.new_zeros(len(keys)), near.codes.flatten(), q.flatten())
    for some in _broad_blocks(problem, near.broad):
        log_q = _log_softmax(problem, some, bias)
        q_some = log_q.exp()
        entropies[some] = -(q_some * log_q).sum(1).double()
        mean += q_some.sum(0, dtype=torch.float64)
    mean /= len(queries)
    sample = entropies.mean().to(queries.dtype)
    batch = -(mean * (mean + EPS).log()).sum().to(queries.dtype)
    return Found(near.best, sample, batch, near.codes, q, mean, near.broad)


def backward(
    problem: Problem,
    found: Found,
    soft: Tensor | None,
    hard: Tensor | None,
    sample: Tensor | None,
    batch: Tensor | None,
    implementation: str = "tiled",
) -> Gradients:
    """Gradients of the inputs from those of the outputs.

    Args:
        soft: (N, D), reaches all codes and the queries through the softmax: the gradient of z_q.
        hard: (N, D), reaches the chosen codes only: z_q's and that of the plain lookup together.
        sample: (), the gradient of the mean entropy of the rows.
        batch: (), the gradient of the entropy of the mean row.
        implementation: of the pass through the softmax.
    """
    queries, keys, codes = problem.queries, problem.keys, problem.codes
    into = Gradients(
        torch.zeros_like(queries) if soft is None else torch.empty_like(queries),
        torch.zeros_like(keys) if soft is None else torch.empty_like(keys),
        queries.new_empty(0) if codes is None else torch.zeros_like(codes),
    )
    mass = queries.new_zeros(len(keys))  # sum_n dL, needed for distances
    if soft is not None and implementation == "triton":
        from lexel.kernels import triton_kernels  # needs the triton package

        d_queries, d_keys, mass = triton_kernels.soft(problem, soft, _bias(problem))
        into = Gradients(d_queries, d_keys, into.codes)
    elif soft is not None:
        _soft(problem, soft, into, mass)
    if sample is not None or batch is not None:
        zero = found.mean.new_zeros(())
        _entropies(problem, found, zero if sample is None else sample, zero if batch is None else batch, into, mass)
    if problem.distance:
        into.keys.addcmul_(keys, mass[:, None], value=-2)
    if hard is not None:
        add_rows(into.keys if codes is None else into.codes, found.indices, hard)
    return into


def _soft(problem: Problem, g: Tensor, into: Gradients, mass: Tensor) -> None:
    """Writes the gradient through the softmax of the straight-through one-hot."""
    queries, keys, bias, temperature = problem.queries, problem.keys, _bias(problem), problem.temperature
    codes = keys if problem.codes is None else problem.codes
    g = g / temperature
    rows = min(problem.rows, len(queries))
    p, dl = queries.new_empty(rows, len(keys)), queries.new_empty(rows, len(keys))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        n = len(queries[part])
        _products(queries[part], keys, bias, out=p[:n])
        _products(g[part], codes, None, out=dl[:n])
        if temperature != 1:
            p[:n].div_(temperature)
        if queries.dtype == torch.float32 and not queries.is_cuda:
            torch.maximum(p[:n], p[:n].amax(1, keepdim=True) - FLOOR, out=p[:n])
        torch.softmax(p[:n], 1, out=p[:n])
        torch.ops.aten._softmax_backward_data.out(dl[:n], p[:n], 1, dl.dtype, grad_input=dl[:n])
        torch.mm(dl[:n], keys, out=into.queries[part])
        if start == 0:
            torch.mm(dl[:n].T, queries[part], out=into.keys)
        else:
            into.keys.addmm_(dl[:n].T, queries[part])
        if problem.distance:
            mass += dl[:n].sum(0)


def _entropies(problem: Problem, found: Found, sample: Tensor, batch: Tensor, into: Gradients, mass: Tensor) -> None:
    """Adds the gradients of both entropies."""
    queries, keys = problem.queries, problem.keys
    scale = 1 / (len(queries) * problem.entropy_temperature)
    pull = (found.mean + EPS).log() + found.mean / (found.mean + EPS)  # (K,)

    def slope(q: Tensor, log_q: Tensor, pull: Tensor) -> Tensor:
        surprise = log_q - (q * log_q).sum(1, keepdim=True)
        relief = pull - (q * pull).sum(1, keepdim=True)
        return -scale * q * (sample.to(q.dtype) * surprise + batch.to(q.dtype) * relief)

    # The slopes of a row add up to zero and its codes lie close together: their sum is taken before rounding.
    d_queries = torch.zeros_like(queries, dtype=torch.float64)

    # Rows with a list: one or two codes each.
    listed = slope(found.q, torch.where(found.q > 0, found.q, 1.0).log(), pull[found.near])
    row, place = (found.q > 0).nonzero(as_tuple=True)
    code, value = found.near[row, place], listed[row, place]
    add_rows(d_queries, row, value[:, None] * keys[code])
    value = value.to(queries.dtype)
    add_rows(into.keys, code, value[:, None] * queries[row])
    add_rows(mass, code, value)

    # Broad rows: all codes.
    bias = _bias(problem)
    for some in _broad_blocks(problem, found.broad):
        log_q = _log_softmax(problem, some, bias)
        dl = slope(log_q.exp(), log_q, pull.to(log_q.dtype))
        for start in range(0, len(keys), TILE):
            part = slice(start, start + TILE)
            d_queries[some] += dl[:, part] @ keys[part].to(dl.dtype)
        dl = dl.to(queries.dtype)
        into.keys.addmm_(dl.T, queries[some])
        mass += dl.sum(0)
    into.queries.add_(d_queries)


def _broad_blocks(problem: Problem, broad: Tensor) -> tuple[Tensor, ...]:
    """Broad rows, a few at a time: some eight buffers of float64 take what the two of the softmax take."""
    return broad.nonzero().squeeze(1).split(max(1, problem.rows // 8))


def _bias(problem: Problem) -> Tensor | None:
    return minus_squares(problem.keys) if problem.distance else None


def _log_softmax(problem: Problem, some: Tensor, bias: Tensor | None) -> Tensor:
    """log q of some rows against all codes: (n, K)."""
    # Logits divided by a small temperature multiply float32 rounding; at the softmax's own it is as for the softmax.
    wide = problem.entropy_temperature < problem.temperature
    queries = problem.queries[some].to(torch.float64 if wide else problem.queries.dtype)
    logits = _products(queries, problem.keys, bias, queries.new_empty(len(queries), len(problem.keys)))
    return logits.div_(problem.entropy_temperature).log_softmax(1)


def _products(queries: Tensor, keys: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """queries @ keys.T + bias; on a CPU tile by tile, so that a tile of keys stays in the cache for all rows."""
    if out.is_cuda and out.dtype == keys.dtype:  # a GPU would wait for the launches of small products
        if bias is None:
            return torch.mm(queries, keys.T, out=out)
        return torch.addmm(bias.to(out.dtype), queries, keys.T, out=out)
    # Rows of `out` lie a power of two apart: a product writing there meets the same few cache lines again and again.
    dense = out.new_empty(len(queries), min(TILE, len(keys)))
    for start in range(0, len(keys), TILE):
        part = slice(start, start + TILE)
        tile = keys[part].to(out.dtype)
        scores = dense[:, : len(tile)]
        torch.mm(queries, tile.T, out=scores)
        if bias is None:
            out[:, part].copy_(scores)
        else:
            torch.add(scores, bias[part].to(out.dtype), out=out[:, part])
    return out


def add_rows(target: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """target[indices] += rows, in place, with the same rounding in every run."""
    if target.is_cuda:  # index_add_ would use atomics; this sorts
        return target.index_put_((indices,), rows, accumulate=True)
    return target.index_add_(0, indices, rows)
