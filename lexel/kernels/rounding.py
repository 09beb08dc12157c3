"""Rows in the precision of a scan, and proven bounds of what that rounds away from their scores."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.kernels.scores import TILE, codes_at_a_time, unit

GROUP = 16  # codes that share one maximum
APART = TILE // GROUP  # how far from each other in a tile they lie


class Norms(NamedTuple):
    """The largest lengths among the codes, for rounding bounds."""

    keys: Tensor  # () of a code
    residual: Tensor  # () of a code minus its rounding for the scan; 0 for a scan in full precision
    of_groups: tuple[Tensor, Tensor] | None = None  # both, (groups,) each, where the scan is in int8


class Rounded(NamedTuple):
    """Rows in the precision of a scan. Values are those of `rows`, times `scales` where the scan is in int8."""

    rows: Tensor  # (n, D), of the scan's type
    scales: Tensor | None  # (n,) for int8: a row's largest number is at most 127 of them

    def values(self, dtype: torch.dtype) -> Tensor:
        """The rounded rows as numbers (n, D)."""
        values = self.rows.to(dtype)
        return values if self.scales is None else values * self.scales[:, None]


def rounded(rows: Tensor, scan: torch.dtype) -> Rounded:
    """Rows (n, D) in the precision of a scan."""
    if scan != torch.int8:
        return Rounded(rows.to(scan), None)
    scales = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(rows.dtype).tiny)
    return Rounded((rows / scales[:, None]).round_().to(torch.int8), scales)


def prepared(keys: Tensor, scan: torch.dtype) -> tuple[Norms, Rounded | None]:
    """Norms of the codes and, for a scan in int8, the rounded table: a quarter of the memory of the codes."""
    if scan == torch.int8:
        return _int8_table(keys)
    tiles = keys.split(codes_at_a_time(keys))
    largest = torch.stack([tile.norm(dim=1).amax() for tile in tiles]).amax()
    if scan == keys.dtype:
        return Norms(largest, torch.zeros_like(largest)), None
    residuals = [(tile - tile.to(scan).to(keys.dtype)).norm(dim=1).amax() for tile in tiles]
    return Norms(largest, torch.stack(residuals).amax()), None


def _int8_table(keys: Tensor) -> tuple[Norms, Rounded]:
    """Norms and the table in int8. Codes of a group share a scale, so that its integers tell which is the best."""
    rows, scales = torch.empty_like(keys, dtype=torch.int8), keys.new_empty(len(keys))
    lengths, residuals = [], []
    scaled, whole = (keys.new_empty(min(TILE, len(keys)), keys.shape[1]) for _ in range(2))  # reused: pages cost time
    for start in range(0, len(keys), TILE):
        tile = keys[start : start + TILE]
        x, y = scaled[: len(tile)], whole[: len(tile)]
        largest = _by_group(torch.abs(tile, out=x).amax(1))
        scale = (largest / 127).clamp_min(torch.finfo(keys.dtype).tiny).expand(GROUP, APART).flatten()[: len(tile)]
        torch.round(torch.div(tile, scale[:, None], out=x), out=y)
        rows[start : start + TILE], scales[start : start + TILE] = y, scale
        lengths.append(_by_group(tile.norm(dim=1)))
        residuals.append(_by_group(x.sub_(y).norm(dim=1) * scale))
    of_groups = torch.cat(lengths), torch.cat(residuals)
    return Norms(of_groups[0].amax(), of_groups[1].amax(), of_groups), Rounded(rows, scales)


def _by_group(values: Tensor) -> Tensor:
    """The largest of each group of a tile's codes: (APART,) of values (n,), which are at least 0."""
    return torch.nn.functional.pad(values, (0, TILE - len(values))).view(GROUP, APART).amax(0)


class RowErrors(NamedTuple):
    """What a scan may round away from a row's score of a code: length |e| + residual |e - its rounding| + constant."""

    length: Tensor  # (n,)
    residual: Tensor  # (n,)
    constant: Tensor  # ()

    def at_most(self, norms: Norms) -> Tensor:
        """The bound for all codes: (n,)."""
        return self.length * norms.keys + self.residual * norms.residual + self.constant

    def of(self, lengths: Tensor, residuals: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The bounds (pairs,) for pairs (row, group), by the largest lengths in the groups."""
        return lambda rows, groups: (
            self.length[rows] * lengths[groups] + self.residual[rows] * residuals[groups] + self.constant
        )


def row_errors(queries: Tensor, bias: Tensor | None, scan: torch.dtype) -> RowErrors:
    """The bounds of scores' errors before a scan rounds them for storage."""
    # |fl(q.k) - q.k| <= D u |q| |k| / (1 - D u), and one rounding more for the bias; 1.01 covers the denominator and
    # the rounding of the norms. Products of bfloat16 numbers are exact in float32 and summed there; sums of int8
    # products are exact, and rounded three times: to float32, and by the two scales; two more are in the residuals of
    # rows and codes. D is at least 32 there.
    norms = queries.norm(dim=1)
    share = (queries.shape[1] + 2) * unit(queries.dtype)
    length = share * norms
    constant = length.new_zeros(()) if bias is None else share * bias.abs().amax().to(length.dtype)
    if scan == queries.dtype:
        return RowErrors(1.01 * length, torch.zeros_like(length), 1.01 * constant)
    scanned = rounded(queries, scan).values(queries.dtype)
    length = 1.01 * length + (queries - scanned).norm(dim=1)
    if bias is not None and scan != torch.int8:
        length = length + unit(scan) * norms  # rounded for storage before the bias is added
    return RowErrors(1.01 * length, 1.01 * scanned.norm(dim=1), 1.01 * 1.01 * constant)


def scan_error(queries: Tensor, bias: Tensor | None, scan: torch.dtype, norms: Norms) -> Tensor:
    """The bound of a score's error before the scan rounds it for storage, for all codes: (n,)."""
    return row_errors(queries, bias, scan).at_most(norms)
