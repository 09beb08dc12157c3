"""The gradient of index backpropagation through the softmax on a CPU, a tile of rows x codes at a time.

The formulas are those of `lexel.kernels.tiled`.
"""

import math

import torch
from torch import Tensor

from lexel.kernels.inputs import Inputs
from lexel.kernels.scores import codes_at_a_time, minus_squares

# p is kept above exp(-FLOOR) of a row's largest, at most K exp(-40) of mass: denormal numbers slow a CPU down.
FLOOR = 40.0
# So few rows at a time against all codes take longer than two passes over the codes, which take ROWS_TWICE at a time.
LEAST_ROWS, ROWS_TWICE = 24, 256


class _Tiles:
    """Softmaxes and their gradients on a CPU, of some rows and some codes at a time; `indices` are the codes chosen.

    A tile of rows x codes lies by itself in memory, and is passed over while it is in the cache. Two things come
    with the products, as columns of numbers beside the queries and of ones beside the keys: a row's logits and its
    S (see above) lose those of the code it chose, which keeps powers below one and the cancellation of a saturated
    row exact; and logits of distances lose |k|^2. Powers of two take a third of the time of a softmax.
    """

    def __init__(self, inputs: Inputs, indices: Tensor, g: Tensor) -> None:
        queries, keys = inputs.queries, inputs.keys
        self.keys, self.codes = keys, keys if inputs.codes is None else inputs.codes
        self.bias = None if not inputs.distance else minus_squares(keys).to(queries.dtype)
        chosen = (queries * keys[indices]).sum(1) + (0 if self.bias is None else self.bias[indices])
        # Distances have keys for codes, so that one table serves both products; S takes nothing of its last column.
        ones = [] if self.bias is None else [torch.ones_like(chosen[:, None])]
        self.left = torch.cat([queries, -chosen[:, None], *ones], 1)
        self.left_g = torch.zeros_like(self.left)
        self.left_g[:, : g.shape[1]] = g
        self.left_g[:, g.shape[1]] = -(g * self.codes[indices]).sum(1)
        self.together = codes_at_a_time(keys)
        self.right = keys.new_ones(self.together, self.left.shape[1])
        self.right_g = self.right if self.codes is keys else self.right.clone()
        self.scale = math.log2(math.e) / inputs.temperature

    def codes_of(self) -> list[slice]:
        """The tiles' codes."""
        return [
            slice(start, min(start + self.together, len(self.keys)))
            for start in range(0, len(self.keys), self.together)
        ]

    def load(self, tile: slice) -> None:
        """Takes the codes of a tile."""
        size = tile.stop - tile.start
        self.right[:size, : self.keys.shape[1]] = self.keys[tile]
        if self.bias is not None:
            self.right[:size, -1] = self.bias[tile]
        if self.codes is not self.keys:
            self.right_g[:size, : self.codes.shape[1]] = self.codes[tile]

    def compute(self, part: slice, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' powers p, not yet divided by their sum, and S, over the tile's codes; written to p and s."""
        p = torch.mm(self.left[part], self.right[: p.shape[1]].T, out=p).mul_(self.scale)
        if p.dtype == torch.float32:
            p.clamp_(min=-FLOOR * math.log2(math.e))
        return p.exp2_(), torch.mm(self.left_g[part], self.right_g[: s.shape[1]].T, out=s)


def soft_in_tiles(
    inputs: Inputs, indices: Tensor, g: Tensor, d_queries: Tensor, d_keys: Tensor, logit_grad_sum: Tensor
) -> None:
    """Writes d_queries and d_keys, adds to logit_grad_sum (K,): some rows against all codes, whose p and S are kept."""
    queries, keys = inputs.queries, inputs.keys
    tiles = _Tiles(inputs, indices, g)
    rows, codes = min(inputs.rows, len(queries)), tiles.codes_of()
    p_of, dl_of = ([queries.new_empty(rows, tile.stop - tile.start) for tile in codes] for _ in range(2))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        n = len(queries[part])
        total, mean = queries.new_zeros(n, 1), queries.new_zeros(n, 1)
        for tile, p, dl in zip(codes, p_of, dl_of, strict=True):
            tiles.load(tile)
            p, dl = tiles.compute(part, p[:n], dl[:n])
            total += p.sum(1, keepdim=True)
            mean += (p * dl).sum(1, keepdim=True)
        mean /= total
        scale = 1 / (total * inputs.temperature)
        scaled = queries[part] * scale
        for number, (tile, p, dl) in enumerate(zip(codes, p_of, dl_of, strict=True)):
            dl = dl[:n].sub_(mean).mul_(p[:n])
            multiply(dl, keys[tile], d_queries[part], add=number > 0)
            multiply(dl.T, scaled, d_keys[tile], add=start > 0)
            if inputs.distance:
                logit_grad_sum[tile].addmv_(dl.T, scale[:, 0])
        d_queries[part] *= scale


def soft_twice(
    inputs: Inputs, indices: Tensor, g: Tensor, d_queries: Tensor, d_keys: Tensor, logit_grad_sum: Tensor
) -> None:
    """`soft_in_tiles` without a buffer of rows x K: p and S are computed twice, first for the sums of the rows.

    Both times they come from the same products of the same tiles, so the cancellation stays exact.
    """
    queries, keys = inputs.queries, inputs.keys
    tiles = _Tiles(inputs, indices, g)
    rows = min(ROWS_TWICE, len(queries))
    parts = [slice(start, min(start + rows, len(queries))) for start in range(0, len(queries), rows)]
    buffers = queries.new_empty(2, rows * tiles.together)

    def compute(part: slice, tile: slice) -> tuple[Tensor, Tensor]:
        shape = (part.stop - part.start, tile.stop - tile.start)
        p, s = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
        return tiles.compute(part, p, s)

    total, mean = queries.new_zeros(len(queries), 1), queries.new_zeros(len(queries), 1)
    for tile in tiles.codes_of():
        tiles.load(tile)
        for part in parts:
            p, s = compute(part, tile)
            total[part] += p.sum(1, keepdim=True)
            mean[part] += s.mul_(p).sum(1, keepdim=True)
    mean /= total
    scale = 1 / (total * inputs.temperature)
    scaled = queries * scale
    for tile in tiles.codes_of():
        tiles.load(tile)
        for part in parts:
            p, s = compute(part, tile)
            dl = s.sub_(mean[part]).mul_(p)
            multiply(dl, keys[tile], d_queries[part], add=tile.start > 0)
            multiply(dl.T, scaled[part], d_keys[tile], add=part.start > 0)
            if inputs.distance:
                logit_grad_sum[tile].addmv_(dl.T, scale[part][:, 0])
    d_queries *= scale


def multiply(left: Tensor, right: Tensor, into: Tensor, add: bool = False) -> None:
    """Writes left @ right, or adds it; half precision is summed in float32, and on a CPU rounded after it."""
    if left.dtype == into.dtype:
        if add:
            into.addmm_(left, right)
        else:
            torch.mm(left, right, out=into)
        return
    product = torch.mm(left, right, out_dtype=into.dtype) if left.is_cuda else torch.mm(left, right)
    if add:
        into.add_(product)
    else:
        into.copy_(product)
