"""Exact search for the best code by Triton kernels: fixed shapes, few launches, one wait for the device.

The same decision as `search`: a scan in bfloat16 leaves the groups of codes within a proven bound of the best, and
their scores in float64 decide.
"""

from torch import Tensor

from lexel.kernels import triton_kernels
from lexel.kernels.search import GROUP, TILE, WIDTH, Candidates, Norms, finer, joined

GROUPS = 32  # groups looked at for a row; a row with more is scanned again in full precision


def near_codes(queries: Tensor, keys: Tensor, bias: Tensor | None, slack: float, together: int) -> Candidates:
    """As `search.near_codes`, `together` rows of float32 at a time."""
    keys = keys.contiguous()
    half, lengths, residuals = triton_kernels.prepare(keys)
    norms = Norms(lengths.amax(), residuals.amax())
    parts = queries.contiguous().split(together)
    return joined([_near_block(rows, keys, half, bias, slack, norms) for rows in parts])


def _near_block(
    queries: Tensor, keys: Tensor, half: Tensor, bias: Tensor | None, slack: float, norms: Norms
) -> Candidates:
    shift = norms.keys.new_zeros(()) if bias is None else bias.abs().amax().to(norms.keys.dtype)
    short, below, ties = triton_kernels.bounds(queries, norms.keys, norms.residual, shift, slack)
    maxima = triton_kernels.group_maxima(short, half, bias, GROUP, TILE // GROUP)
    groups, found = triton_kernels.near_groups(maxima, below, GROUPS)
    per_tile = TILE // GROUP
    best, near, scores, wide, totals = triton_kernels.list_codes(
        queries, keys, bias, ties, groups, found, slack, GROUP, per_tile, WIDTH
    )
    result = Candidates(best, near, scores, wide, totals.cpu())
    if not result.counts[0]:
        return result
    some = wide.nonzero().squeeze(1)
    return finer(result, some, queries, keys, bias, slack, norms)
