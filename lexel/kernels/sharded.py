"""Search and index backpropagation over a codebook whose rows are spread over processes.

Each process holds K / P neighbouring codes and gets the latents of all processes, so that no process holds the table,
its gradient or its optimizer state as a whole. What a row needs to know of all codes is a few numbers: its best score,
the sum of its softmax, the mean of its gradient under the softmax, its entropy. These travel; tables do not. The
formulas are those of `lexel.kernels.tiled`.

All processes make every call together, with equally many latents.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexel.distributed import all_max, all_rows, all_sum, processes, rank
from lexel.errors import UsageError
from lexel.kernels import tiled
from lexel.kernels.inputs import (
    Inputs,
    Similarity,
    as_scores,
    check_rows,
    check_similarity,
    differentiable_once,
    incoming,
    loss_terms,
)
from lexel.kernels.oracle import EPS
from lexel.kernels.scores import minus_squares
from lexel.kernels.search import near_codes
from lexel.runtime import at_least_float32

NAME = "sharded index backpropagation"


def share_of_codes(size: int) -> range:
    """The codes that this process holds of `size`.

    Raises:
        UsageError: the processes cannot share them evenly.
    """
    if size % processes():
        raise UsageError(f"{processes()} processes cannot share {size:,} codes evenly; use a divisor, or do not shard")
    share = size // processes()
    return range(rank() * share, (rank() + 1) * share)


@torch.no_grad()
def nearest(z: Tensor, shard: Tensor, similarity: Similarity = "l2") -> Tensor:
    """The index, among all codes, of the best one for each row of z (N, D): int64 (N,), as `lexel.kernels.nearest`.

    Args:
        z: rows of this process, as many as every other process has.
        shard: (K / P, D), the codes of this process.
        similarity: "l2", "dot" or "cosine".

    Raises:
        UsageError: shapes do not fit, or processes have different numbers of rows.
    """
    check_rows(z, shard)
    check_similarity(similarity)
    with torch.autocast(z.device.type, enabled=False):
        queries, keys, distance = as_scores(at_least_float32(z), at_least_float32(shard), similarity)
        return _own(_best(_gathered(queries), keys, distance))


def lookup(indices: Tensor, shard: Tensor) -> Tensor:
    """The codes (N, D) with these indices (N,) of all codes; their gradient goes to the process that holds them."""
    found: Tensor = _Lookup.apply(indices, shard)
    return found


def index_backpropagation(
    z: Tensor,
    shard: Tensor,
    *,
    temperature: float = 1.0,
    entropy_temperature: float = 0.01,
    similarity: Similarity = "dot",
    entropy: bool = True,
    rows: int | None = None,
    entropy_parts: int = 1,
    entropy_processes: int = 1,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`lexel.kernels.index_backpropagation` over all codes, from this process's share of them.

    The gradient of `shard` is the mean over processes, as data-parallel training makes it for other parameters.

    Args:
        z: (N, D), rows of this process, as many as every other process has.
        shard: (K / P, D), the codes of this process.
        rows: at a time in the backward pass; it holds two buffers of rows x K / P.
        temperature, entropy_temperature, similarity, entropy, entropy_parts, entropy_processes: as there.

    Raises:
        UsageError: shapes do not fit, or processes have different numbers of rows.
    """
    check_rows(z, shard)
    check_similarity(similarity)
    with torch.autocast(z.device.type, enabled=False):
        z, shard = at_least_float32(z), at_least_float32(shard)
        queries, keys, distance = as_scores(z, shard, similarity)
        own = Inputs(
            queries,
            keys,
            None if keys is shard else shard,
            distance,
            temperature,
            entropy_temperature,
            entropy,
            rows or tiled.rows_at_a_time(len(keys), z.is_cuda),
            entropy_parts,
            entropy_processes,
        )
        z_q, chosen, indices, sample, batch = _Sharded.apply(*own)
        terms = loss_terms(z, z_q, chosen)
        if entropy:
            terms |= {"entropy_sample": sample, "entropy_batch": batch}
    return z_q, indices, terms


def _of_all(own: Inputs, everyones: Tensor) -> Inputs:
    """The rows of all processes and the codes of this one, as the tiled implementation takes them."""
    return own._replace(queries=everyones, parts=own.parts * processes() // own.together, together=1)


def _own_parts(own: Inputs) -> slice:
    """The parts of all rows in which this process has rows."""
    first = rank() * own.parts if own.together == 1 else rank() // own.together
    return slice(first, first + own.parts)


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes."""
    found = all_rows(rows.detach().contiguous())
    if len(found) != len(rows) * processes():
        raise UsageError(f"every process must have as many latents; this one has {len(rows)}, all have {len(found)}")
    return found


def _own(rows: Tensor) -> Tensor:
    """Of the rows of all processes, those of this one."""
    return rows.chunk(processes())[rank()] if processes() > 1 else rows


def _best(queries: Tensor, keys: Tensor, distance: bool) -> Tensor:
    """The best of all codes for the rows of all processes; ties go to the lowest."""
    bias = minus_squares(keys) if distance else None
    own = near_codes(queries, keys, bias).best
    # One row at a time and no matrix product: equal codes get equal scores to the bit, wherever they lie.
    parts = zip(queries.split(4096), keys[own].split(4096), strict=True)
    scores = torch.cat([(some.double() * best.double()).sum(1) for some, best in parts])
    if bias is not None:
        scores += bias[own]
    everyones = all_rows(torch.stack([scores, (own + rank() * len(keys)).double()])[None])  # (P, 2, N); K < 2^53
    winner = (everyones[:, 0] == everyones[:, 0].amax(0)).int().argmax(0)  # the first of equals holds lower codes
    return everyones[:, 1].gather(0, winner[None])[0].long()


def _looked_up(indices: Tensor, codes: Tensor) -> Tensor:
    """The codes of indices of all processes."""
    place = indices - rank() * len(codes)
    mine = (place >= 0) & (place < len(codes))
    return all_sum(torch.where(mine[:, None], codes[place.clamp(0, len(codes) - 1)], codes.new_zeros(())))


def _add_chosen(into: Tensor, indices: Tensor, gradients: Tensor) -> None:
    """Adds the gradients of chosen codes, of all processes, to those that lie here."""
    place = indices - rank() * len(into)
    mine = ((place >= 0) & (place < len(into))).nonzero().squeeze(1)
    tiled.add_rows(into, place[mine], gradients[mine])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, shard: Tensor) -> Tensor:
        everyones = _gathered(indices)
        ctx.save_for_backward(everyones, shard)
        return _own(_looked_up(everyones, shard)).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        indices, shard = ctx.saved_tensors
        into = torch.zeros_like(shard)
        _add_chosen(into, indices, _gathered(gradient) / processes())
        return None, into


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, ...]:
        own = Inputs(*fields)
        queries, keys, codes, *ctx.options = own
        everyones = _gathered(queries)
        indices = _best(everyones, keys, own.distance)
        z_q = _own(_looked_up(indices, keys if codes is None else codes)).clone()
        ctx.found = found = _entropies(_of_all(own, everyones)) if own.entropy else None
        ctx.save_for_backward(everyones, keys, codes, indices)
        ctx.set_materialize_grads(False)
        zero = queries.new_zeros(())
        sample = zero if found is None else _own(found.entropies).mean().to(queries.dtype)
        batch = zero.clone() if found is None else found.batch[_own_parts(own)].mean().to(queries.dtype)
        own_indices = _own(indices).clone()
        ctx.mark_non_differentiable(own_indices)
        return z_q, z_q.clone(), own_indices, sample, batch

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        everyones, keys, codes, indices = ctx.saved_tensors
        own = Inputs(everyones, keys, codes, *ctx.options)
        inputs = _of_all(own, everyones)
        soft, hard, sample, batch = incoming(grads)
        # A loss without some term gives the same None in every process: what follows is done by all or by none.
        with torch.no_grad():
            into = tiled.Gradients(
                torch.zeros_like(everyones, dtype=torch.float64),
                torch.zeros_like(keys),
                everyones.new_empty(0) if codes is None else torch.zeros_like(codes),
            )
            logit_sum = everyones.new_zeros(len(keys))
            if soft is not None:
                _soft(inputs, _gathered(soft), into, logit_sum)
            if ctx.found is not None and (sample is not None or batch is not None):
                _entropy_slopes(inputs, own, ctx.found, sample, batch, into, logit_sum)
            if inputs.distance:
                into.keys.addcmul_(keys, logit_sum[:, None], value=-2)
            if hard is not None:
                _add_chosen(into.keys if codes is None else into.codes, indices, _gathered(hard))
            d_queries = _own(all_sum(into.queries)).to(everyones.dtype)
            gradients = (d_queries, into.keys / processes(), None if codes is None else into.codes / processes())
        return *differentiable_once(NAME, gradients, (everyones, keys, codes, *grads)), *[None] * len(ctx.options)


def _soft(inputs: Inputs, g: Tensor, into: tiled.Gradients, logit_sum: Tensor) -> None:
    """Adds the gradient through the softmax of the straight-through one-hot, some rows of all processes at a time."""
    queries, keys, bias = inputs.queries, inputs.keys, tiled._bias(inputs)
    codes = keys if inputs.codes is None else inputs.codes
    for start in range(0, len(queries), inputs.rows):
        part = slice(start, start + inputs.rows)
        some = queries[part]
        p = tiled._products(some, keys, bias, some.new_empty(len(some), len(keys))).div_(inputs.temperature)
        p -= all_max(p.amax(1))[:, None]
        p.exp_()
        dl = tiled._products(g[part], codes, None, torch.empty_like(p))
        # Normalised over the very numbers that are multiplied, so that S - sum p S cancels as it does in one process.
        total, weighted = all_sum(torch.stack([p.sum(1), (p * dl).sum(1)]))
        dl -= (weighted / total)[:, None]
        dl *= p.div_(total[:, None])
        dl /= inputs.temperature
        into.queries[part] += dl @ keys
        into.keys.addmm_(dl.T, some)
        if inputs.distance:
            logit_sum += dl.sum(0)


class _Found(NamedTuple):
    """Statistics of the softmax at the entropy temperature, from the forward pass."""

    near: Tensor  # (N, WIDTH) int64, listed codes of this process
    q: Tensor  # (N, WIDTH) float64, their probabilities among all codes
    wide: Tensor  # (N,) bool, rows without a list here
    counts: Tensor  # (2,) int64 in main memory, as those of `search.Candidates`
    log_sum: Tensor  # (N,) float64, of all codes
    entropies: Tensor  # (N,) float64
    mean: Tensor  # (parts, K / P) float64, the mean of q
    batch: Tensor  # (parts,) float64, its entropy


def _entropies(inputs: Inputs) -> _Found:
    queries, keys, bias, tau = inputs.queries, inputs.keys, tiled._bias(inputs), inputs.entropy_temperature
    # What is far below the best of this process is farther below the best of all.
    slack = tau * (math.log(len(keys) * processes()) + tiled.CUT[queries.dtype])
    near = near_codes(queries, keys, bias, slack)
    local = (near.scores / tau).logsumexp(1)
    for some in tiled._wide_blocks(inputs, near.wide, near.counts):
        local[some] = _scaled(inputs, some, bias).logsumexp(1)
    log_sum = all_rows(local[None]).logsumexp(0)
    log_q = near.scores / tau - log_sum[:, None]
    q = log_q.exp().masked_fill(near.wide[:, None], 0.0)
    entropies = -torch.special.xlogy(q, q).sum(1)
    mean = q.new_zeros(inputs.parts * len(keys))
    tiled.add_rows(mean, tiled._in_part(inputs, near.codes).flatten(), q.flatten())
    mean = mean.view(inputs.parts, -1)
    for some in tiled._wide_blocks(inputs, near.wide, near.counts):
        log_some = _scaled(inputs, some, bias) - log_sum[some, None]
        entropies[some] = -(log_some.exp() * log_some).sum(1)
        tiled.add_rows(mean, tiled._part(inputs, some), log_some.exp())
    mean /= len(queries) // inputs.parts
    batch = all_sum(-(mean * (mean + EPS).log()).sum(1))
    return _Found(near.codes, q, near.wide, near.counts, log_sum, all_sum(entropies), mean, batch)


def _scaled(inputs: Inputs, some: Tensor, bias: Tensor | None) -> Tensor:
    """Logits of some rows and the codes here, divided by the entropy temperature: (n, K / P) float64."""
    queries = inputs.queries[some].double()
    return tiled._products(queries, inputs.keys, bias, queries.new_empty(len(queries), len(inputs.keys))).div_(
        inputs.entropy_temperature
    )


def _entropy_slopes(
    inputs: Inputs,
    own: Inputs,
    found: _Found,
    sample: Tensor | None,
    batch: Tensor | None,
    into: tiled.Gradients,
    logit_sum: Tensor,
) -> None:
    """Adds the gradients of both entropies; `own` has the options of this process's call."""
    queries, keys, bias = inputs.queries, inputs.keys, tiled._bias(inputs)
    zero = found.mean.new_zeros(1)
    each = all_rows(zero if sample is None else sample.double().view(1))  # of every process
    of_rows = each.repeat_interleave(len(queries) // processes()) / (len(queries) // processes())
    # A process's batch entropy is the mean over its parts, or that of its group.
    of_parts = all_rows(zero if batch is None else batch.double().view(1))
    if own.together == 1:
        of_parts = of_parts.repeat_interleave(own.parts) / own.parts
    of_parts = of_parts.view(inputs.parts, -1).sum(1) / (len(queries) // inputs.parts)
    slope = (found.mean + EPS).log() + found.mean / (found.mean + EPS)  # -dA/dQ, (parts, K / P)
    part = tiled._part(inputs, torch.arange(len(queries), device=queries.device))
    weight = of_parts[part]

    listed = slope.flatten()[tiled._in_part(inputs, found.near)]
    centre = (found.q * listed).sum(1)
    for some in tiled._wide_blocks(inputs, found.wide, found.counts):
        q = (_scaled(inputs, some, bias) - found.log_sum[some, None]).exp()
        centre[some] = (q * slope[part[some]]).sum(1)
    centre = all_sum(centre)

    def gradient(q: Tensor, log_q: Tensor, slopes: Tensor, some: Tensor | slice) -> Tensor:
        of_sample = of_rows[some, None] * (log_q + found.entropies[some, None])
        of_batch = weight[some, None] * (slopes - centre[some, None])
        return -q * (of_sample + of_batch) / inputs.entropy_temperature

    log_q = torch.where(found.q > 0, found.q, 1.0).log()
    values = gradient(found.q, log_q, listed, slice(None))
    row, place = (found.q > 0).nonzero(as_tuple=True)
    code, value = found.near[row, place], values[row, place]
    tiled.add_rows(into.queries, row, value[:, None] * keys[code])
    value = value.to(queries.dtype)
    tiled.add_rows(into.keys, code, value[:, None] * queries[row])
    tiled.add_rows(logit_sum, code, value)
    for some in tiled._wide_blocks(inputs, found.wide, found.counts):
        log_some = _scaled(inputs, some, bias) - found.log_sum[some, None]
        dl = gradient(log_some.exp(), log_some, slope[part[some]], some)
        into.queries[some] += dl @ keys.double()
        dl = dl.to(queries.dtype)
        into.keys.addmm_(dl.T, queries[some])
        logit_sum += dl.sum(0)
