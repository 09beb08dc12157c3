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
mostly one or two codes, is done in float64. Rows with more than `search.WIDTH` such codes are wide: they are done
against all codes, in float64 where tau is the smaller temperature.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.distributed import group_mean
from lexel.kernels.inputs import Inputs
from lexel.kernels.oracle import EPS
from lexel.kernels.scores import codes_at_a_time, minus_squares
from lexel.kernels.search import WIDTH, near_codes
from lexel.kernels.tiled_softmax import FLOOR, LEAST_ROWS, multiply, soft_in_tiles, soft_twice

# exp(-CUT) bounds the probability mass that a row's entropies may lose.
CUT = {torch.float32: 28.0, torch.float64: 46.0}
TRITON_DIM = 256  # the longest rows that the Triton kernels of the gradient take


class ForwardState(NamedTuple):
    """The forward pass's state for the backward pass; `near` to `wide` are empty without entropies."""

    indices: Tensor  # (N,) int64
    sample: Tensor  # () mean entropy of the rows
    batch: Tensor  # () entropy of the mean row
    near: Tensor  # (N, WIDTH) int64, the codes that hold a row's logit_grad_sum at the entropy temperature
    q: Tensor  # (N, WIDTH) float64, their probabilities; 0 where there are fewer
    mean: Tensor  # (parts * K,) float64, the mean of q over the rows of each part, and of the same part elsewhere
    wide: Tensor  # (N,) bool, rows that have no such list
    share: Tensor  # () float64, what the rows here count in `mean`; 1 where all processes have equally many
    counts: Tensor  # (2,) int64 in main memory: how many rows are wide, how many codes are listed in all


class Gradients(NamedTuple):
    """Gradients of the inputs; `codes` is empty where the keys are the codes."""

    queries: Tensor
    keys: Tensor
    codes: Tensor


def rows_at_a_time(size: int, cuda: bool) -> int:
    """Rows that the backward pass takes at a time by default."""
    most, budget = (4096, 2**27) if cuda else (384, 2**25)
    return max(16, min(most, budget // size))


def empty_state(inputs: Inputs) -> ForwardState:
    """The state of `forward` in its shapes and types, and without entropies in its values but for the search's."""
    queries, rows = inputs.queries, len(inputs.queries) if inputs.entropy else 0
    return ForwardState(
        queries.new_empty(len(queries), dtype=torch.int64),
        queries.new_zeros(()),
        queries.new_zeros(()),
        queries.new_empty((rows, WIDTH), dtype=torch.int64),
        queries.new_empty((rows, WIDTH), dtype=torch.float64),
        queries.new_empty(inputs.parts * len(inputs.keys) if inputs.entropy else 0, dtype=torch.float64),
        queries.new_empty(rows, dtype=torch.bool),
        queries.new_ones((), dtype=torch.float64),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


def forward(inputs: Inputs, implementation: str = "tiled") -> ForwardState:
    """Indices and entropies; `implementation` is that of the scan."""
    queries, keys, bias, tau = inputs.queries, inputs.keys, _bias(inputs), inputs.entropy_temperature
    slack = tau * (math.log(len(keys)) + CUT[queries.dtype]) if inputs.entropy else 0.0
    near = near_codes(queries, keys, bias, slack, implementation=implementation)
    if not inputs.entropy:
        return empty_state(inputs)._replace(indices=near.best, counts=near.counts)

    # A wide row's list is empty, and its softmax is no number: it takes part below.
    q = (near.scores / tau).softmax(1).masked_fill(near.wide[:, None], 0.0)
    entropies = -torch.special.xlogy(q, q).sum(1)
    row, place = _listed(near.scores.isfinite(), near.counts)
    mean = add_rows(
        q.new_zeros(inputs.parts * len(keys)), _in_part(inputs, near.codes)[row, place].contiguous(), q[row, place]
    )
    for some in _wide_blocks(inputs, near.wide, near.counts):
        log_q = _log_softmax(inputs, some, bias)
        q_some = log_q.exp()
        entropies[some] = -(q_some * log_q).sum(1).double()
        if inputs.parts == 1:
            mean += q_some.sum(0, dtype=torch.float64)
        else:
            add_rows(mean.view(inputs.parts, -1), _part(inputs, some), q_some.double())
    mean /= len(queries) // inputs.parts
    mean, share = group_mean(mean, len(queries), inputs.together)
    sample = entropies.mean().to(queries.dtype)
    batch = -(mean * (mean + EPS).log()).sum().div(inputs.parts).to(queries.dtype)
    return ForwardState(near.best, sample, batch, near.codes, q, mean, near.wide, share, near.counts)


def backward(
    inputs: Inputs,
    state: ForwardState,
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
    queries, keys, codes = inputs.queries, inputs.keys, inputs.codes
    into = Gradients(
        torch.zeros_like(queries) if soft is None else torch.empty_like(queries),
        torch.zeros_like(keys) if soft is None else torch.empty_like(keys),
        queries.new_empty(0) if codes is None else torch.zeros_like(codes),
    )
    logit_grad_sum = queries.new_zeros(len(keys))  # sum_n dL, needed for distances
    if soft is not None and implementation == "triton" and inputs.half and keys.shape[1] <= TRITON_DIM:
        from lexel.kernels import triton_softmax  # needs the triton package

        d_queries, d_keys, logit_grad_sum = triton_softmax.soft(inputs, soft, _bias(inputs))
        into = Gradients(d_queries, d_keys, into.codes)
    elif soft is not None and (queries.is_cuda or inputs.half or len(keys) <= codes_at_a_time(keys)):
        _soft(inputs, soft, into, logit_grad_sum)
    elif soft is not None:
        in_tiles = soft_twice if inputs.rows <= LEAST_ROWS else soft_in_tiles
        in_tiles(inputs, state.indices, soft, into.queries, into.keys, logit_grad_sum)
    if sample is not None or batch is not None:
        zero = state.mean.new_zeros(())
        _entropies(
            inputs, state, zero if sample is None else sample, zero if batch is None else batch, into, logit_grad_sum
        )
    if inputs.distance:
        into.keys.addcmul_(keys, logit_grad_sum[:, None], value=-2)
    if hard is not None:
        add_rows(into.keys if codes is None else into.codes, state.indices, hard)
    return into


def _soft(inputs: Inputs, g: Tensor, into: Gradients, logit_grad_sum: Tensor) -> None:
    """Writes the gradient through the softmax of the straight-through one-hot."""
    queries, keys, bias, temperature = inputs.queries, inputs.keys, _bias(inputs), inputs.temperature
    codes = keys if inputs.codes is None else inputs.codes
    g = g / temperature
    rows = min(inputs.rows, len(queries))
    p, dl = queries.new_empty(rows, len(keys)), queries.new_empty(rows, len(keys))
    low = torch.bfloat16 if inputs.half else queries.dtype
    low_g, low_codes, low_queries = g.to(low), codes.to(low), queries.to(low)
    low_keys = low_codes if codes is keys else keys.to(low)
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        n = len(queries[part])
        if queries.is_cuda:
            _products(low_queries[part], low_keys, bias, out=p[:n])
        else:  # a CPU's product of bfloat16 is rounded to bfloat16, which is too coarse for logits
            _products(queries[part], keys, bias, out=p[:n])
        _products(low_g[part], low_codes, None, out=dl[:n])
        if temperature != 1:
            p[:n].div_(temperature)
        if queries.dtype == torch.float32 and not queries.is_cuda:
            torch.maximum(p[:n], p[:n].amax(1, keepdim=True) - FLOOR, out=p[:n])
        torch.softmax(p[:n], 1, out=p[:n])
        torch.ops.aten._softmax_backward_data.out(dl[:n], p[:n], 1, dl.dtype, grad_input=dl[:n])
        low_dl = dl[:n].to(low)
        multiply(low_dl, low_keys, into.queries[part])
        multiply(low_dl.T, low_queries[part], into.keys, add=start > 0)
        if inputs.distance:
            logit_grad_sum += dl[:n].sum(0)


def _entropies(
    inputs: Inputs, state: ForwardState, sample: Tensor, batch: Tensor, into: Gradients, logit_grad_sum: Tensor
) -> None:
    """Adds the gradients of both entropies."""
    queries, keys = inputs.queries, inputs.keys
    scale = 1 / (len(queries) * inputs.entropy_temperature)
    batch = batch * state.share.to(batch.dtype)
    d_batch = (state.mean + EPS).log() + state.mean / (state.mean + EPS)  # (parts * K,)

    def slope(q: Tensor, log_q: Tensor, d_batch: Tensor) -> Tensor:
        centred_log_q = log_q - (q * log_q).sum(1, keepdim=True)
        centred_d_batch = d_batch - (q * d_batch).sum(1, keepdim=True)
        return -scale * q * (sample.to(q.dtype) * centred_log_q + batch.to(q.dtype) * centred_d_batch)

    # The slopes of a row add up to zero and its codes lie close together: their sum is taken before rounding.
    d_queries = torch.zeros_like(queries, dtype=torch.float64)

    # Rows with a list: one or two codes each.
    listed = slope(state.q, torch.where(state.q > 0, state.q, 1.0).log(), d_batch[_in_part(inputs, state.near)])
    row, place = _listed(state.q > 0, state.counts)
    code, value = state.near[row, place], listed[row, place]
    add_rows(d_queries, row, value[:, None] * keys[code])
    value = value.to(queries.dtype)
    add_rows(into.keys, code, value[:, None] * queries[row])
    add_rows(logit_grad_sum, code, value)

    # Broad rows: all codes.
    bias = _bias(inputs)
    for some in _wide_blocks(inputs, state.wide, state.counts):
        log_q = _log_softmax(inputs, some, bias)
        of_parts = d_batch.view(inputs.parts, -1).to(log_q.dtype)
        dl = slope(log_q.exp(), log_q, of_parts if inputs.parts == 1 else of_parts[_part(inputs, some)])
        together = codes_at_a_time(keys)
        for start in range(0, len(keys), together):
            part = slice(start, start + together)
            d_queries[some] += dl[:, part] @ keys[part].to(dl.dtype)
        dl = dl.to(queries.dtype)
        into.keys.addmm_(dl.T, queries[some])
        logit_grad_sum += dl.sum(0)
    into.queries.add_(d_queries)


def _part(inputs: Inputs, rows: Tensor) -> Tensor:
    """The part of the batch to which each row belongs."""
    return rows.div(len(inputs.queries) // inputs.parts, rounding_mode="floor")


def _in_part(inputs: Inputs, near: Tensor) -> Tensor:
    """Listed codes (N, WIDTH) as positions in `mean`, which has K numbers for each part."""
    if inputs.parts == 1:
        return near
    rows = torch.arange(len(near), device=near.device)
    return near + len(inputs.keys) * _part(inputs, rows)[:, None]


def _listed(used: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and places of the used numbers of a list (N, WIDTH), without a wait for the device."""
    if not used.is_cuda:
        row, place = used.nonzero(as_tuple=True)
    else:  # at most counts[1]; the rest are of the last row's last place, and count there for nothing
        row, place = torch.nonzero_static(used, size=int(counts[1]), fill_value=-1).unbind(1)
    return row, place


def _wide_blocks(inputs: Inputs, wide: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Broad rows, a few at a time: some eight buffers of float64 take what the two of the softmax take."""
    if not counts[0]:  # in main memory: asked without a wait for the device
        return ()
    return wide.nonzero().squeeze(1).split(max(1, inputs.rows // 8))


def _bias(inputs: Inputs) -> Tensor | None:
    return minus_squares(inputs.keys) if inputs.distance else None


def _log_softmax(inputs: Inputs, some: Tensor, bias: Tensor | None) -> Tensor:
    """log q of some rows against all codes: (n, K)."""
    # Logits divided by a small temperature multiply float32 rounding; at the softmax's own it is as for the softmax.
    double = inputs.entropy_temperature < inputs.temperature
    queries = inputs.queries[some].to(torch.float64 if double else inputs.queries.dtype)
    logits = _products(queries, inputs.keys, bias, queries.new_empty(len(queries), len(inputs.keys)))
    return logits.div_(inputs.entropy_temperature).log_softmax(1)


def _products(queries: Tensor, keys: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """queries @ keys.T + bias; on a CPU tile by tile, so that a tile of keys stays in the cache for all rows."""
    if out.is_cuda and queries.dtype == keys.dtype:  # a GPU would wait for the launches of small products
        if out.dtype != queries.dtype:
            out.copy_(torch.mm(queries, keys.T, out_dtype=out.dtype))
            return out if bias is None else out.add_(bias.to(out.dtype))
        if bias is None:
            return torch.mm(queries, keys.T, out=out)
        return torch.addmm(bias.to(out.dtype), queries, keys.T, out=out)
    # Rows of `out` lie a power of two apart: a product writing there meets the same few cache lines again and again.
    together = codes_at_a_time(keys)
    dense = queries.new_empty(len(queries), min(together, len(keys)))
    for start in range(0, len(keys), together):
        part = slice(start, start + together)
        tile = keys[part].to(queries.dtype)
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
