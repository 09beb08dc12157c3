"""A decode step of one block in five Triton kernels, for the few rows that reading the weights is the cost of.

Norm, modulation and gate join the product they belong to, and rotation, cache and attention are one kernel: some 22
kernels of a block become five, so that a recorded step of a few rows comes near the time to read the weights once.
"""
# mypy: ignore-errors
# (kernels are not Python to a type checker)

import torch
import triton
import triton.language as tl
from torch import Tensor

from lexel.generators.next_token.blocks import EPSILON, Block
from lexel.generators.next_token.fused import CacheWrite, FusedBlock, Modulation
from lexel.generators.next_token.linears import Linear, plain
from lexel.kernels.triton_tiles import operand

ROWS = tl.constexpr(16)  # sequences at once; more take the plain way
CUT = (16, 512, 4, 4)  # of a product: outputs of a program, inputs at a time, warps, stages


@triton.jit
def _product_kernel(
    x,
    scale,
    shift,
    weight,
    gamma,
    out,
    rows,
    width,
    outs,
    scale_stride,
    epsilon,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GAMMA: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: N outputs of all rows. out = weight @ norm(x), gated if told, or added to what `out` holds."""
    row = tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    column = tl.program_id(0) * N + tl.arange(0, N)
    inside = (column < outs)[:, None]
    inverse = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if NORM:
        squares = tl.zeros((ROWS, K), dtype=tl.float32)
        for start in range(0, width, K):
            k = start + tl.arange(0, K)
            value = tl.load(x + row[:, None] * width + k[None, :], mask=there & (k < width)[None, :], other=0.0)
            squares += value.to(tl.float32) * value.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(squares, 1) / width + epsilon)
    total = tl.zeros((ROWS, N), dtype=tl.float32)
    second = tl.zeros((ROWS, N), dtype=tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        known = (k < width)[None, :]
        rounded = tl.load(weight + column[:, None] * width + k[None, :], mask=inside & known, other=0.0)
        value = tl.load(x + row[:, None] * width + k[None, :], mask=there & known, other=0.0)
        if NORM:
            factor = tl.load(scale + row[:, None] * scale_stride + k[None, :], mask=there & known, other=0.0)
            normed = value.to(tl.float32) * inverse[:, None] * factor.to(tl.float32)
            if SHIFT:
                normed += tl.load(shift + row[:, None] * width + k[None, :], mask=there & known, other=0.0)
            value = normed.to(rounded.dtype)
        total += tl.dot(operand(value), tl.trans(operand(rounded)))
        if GATED:
            above = weight + (outs + column).to(tl.int64)[:, None] * width + k[None, :]
            upper = tl.load(above, mask=inside & known, other=0.0)
            second += tl.dot(operand(value), tl.trans(operand(upper)))
    if GATED:
        total = total * tl.sigmoid(total) * second
    where = row[:, None] * outs + column[None, :]
    mask = there & (column < outs)[None, :]
    if GAMMA:
        total *= tl.load(gamma + where, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(out + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + where, total, mask=mask)


@triton.jit
def _attention_kernel(
    qkv,
    rope,
    slots,
    keys,
    values,
    out,
    heads,
    room,
    root,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one head of one row. Rotates, writes the cache at its slot, and attends to all up to it."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots)
    pair = tl.arange(0, HALF)
    known = pair < H // 2
    source = qkv + row * 3 * heads * H + head * H
    cosine = tl.load(rope + 2 * pair, mask=known, other=0.0)
    sine = tl.load(rope + 2 * pair + 1, mask=known, other=0.0)
    even = tl.load(source + 2 * pair, mask=known, other=0.0).to(tl.float32)
    odd = tl.load(source + 2 * pair + 1, mask=known, other=0.0).to(tl.float32)
    q_even, q_odd = (even * cosine - odd * sine) * root, (even * sine + odd * cosine) * root
    own_even = tl.load(source + heads * H + 2 * pair, mask=known, other=0.0).to(tl.float32)
    own_odd = tl.load(source + heads * H + 2 * pair + 1, mask=known, other=0.0).to(tl.float32)
    k_even, k_odd = own_even * cosine - own_odd * sine, own_even * sine + own_odd * cosine
    v_even = tl.load(source + 2 * heads * H + 2 * pair, mask=known, other=0.0)
    v_odd = tl.load(source + 2 * heads * H + 2 * pair + 1, mask=known, other=0.0)
    base = (row * heads + head).to(tl.int64) * room * H
    here = base + slot * H + 2 * pair
    tl.store(keys + here, k_even, mask=known)
    tl.store(keys + here + 1, k_odd, mask=known)
    tl.store(values + here, v_even, mask=known)
    tl.store(values + here + 1, v_odd, mask=known)

    kept_even, kept_odd = k_even.to(v_even.dtype).to(tl.float32), k_odd.to(v_even.dtype).to(tl.float32)
    largest = tl.sum(q_even * kept_even + q_odd * kept_odd, 0)  # the slot itself, from registers
    mass = tl.full((), 1.0, dtype=tl.float32)
    sum_even, sum_odd = v_even.to(tl.float32), v_odd.to(tl.float32)
    for start in range(0, slot, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = (place < slot)[:, None] & known[None, :]
        where = base + place[:, None] * H + 2 * pair[None, :]
        score = tl.sum(tl.load(keys + where, mask=seen, other=0.0).to(tl.float32) * q_even[None, :], 1)
        score += tl.sum(tl.load(keys + where + 1, mask=seen, other=0.0).to(tl.float32) * q_odd[None, :], 1)
        score = tl.where(place < slot, score, -float("inf"))
        peak = tl.maximum(largest, tl.max(score, 0))
        shrink = tl.exp(largest - peak)
        weight = tl.exp(score - peak)
        mass = mass * shrink + tl.sum(weight, 0)
        seen_even = tl.load(values + where, mask=seen, other=0.0).to(tl.float32)
        seen_odd = tl.load(values + where + 1, mask=seen, other=0.0).to(tl.float32)
        sum_even = sum_even * shrink + tl.sum(weight[:, None] * seen_even, 0)
        sum_odd = sum_odd * shrink + tl.sum(weight[:, None] * seen_odd, 0)
        largest = peak
    target = out + (row * heads + head) * H + 2 * pair
    tl.store(target, sum_even / mass, mask=known)
    tl.store(target + 1, sum_odd / mass, mask=known)


class TritonBlock:
    """As `FusedBlock`, with kernels of its own for one new position of at most ROWS sequences in half precision."""

    def __init__(self, block: Block, linear: object, dtype: torch.dtype) -> None:
        weights: list[Tensor] = []

        def keep(weight: Tensor) -> Linear:
            weights.append(weight.contiguous())
            return plain(weights[-1])

        self.plain = FusedBlock(block, keep, dtype)
        self.qkv, self.out, self.gate_up, self.down = weights
        self.heads = self.plain.heads

    def __call__(
        self,
        x: Tensor,
        rope: Tensor,
        modulation: Modulation | None,
        cache: tuple[Tensor, Tensor] | None,
        write: CacheWrite | None,
    ) -> Tensor:
        """x (R, m, C) and its rotary table."""
        if (
            cache is None
            or write is None
            or x.shape[1] != 1
            or len(x) > ROWS.value
            or write.slots.dim() > 1
            or not rope.is_complex()
        ):
            return self.plain(x, rope, modulation, cache, write)
        scale1, shift1, gamma1, scale2, shift2, gamma2 = modulation or (
            *(self.plain.norm1, None, None),
            *(self.plain.norm2, None, None),
        )
        rows, _, width = x.shape
        x = x.contiguous().clone()  # it is added to in place
        qkv = x.new_empty(rows, len(self.qkv))
        _product(x, self.qkv, qkv, scale1, shift1)
        attended = x.new_empty(rows, width)
        keys, values = cache
        size = width // self.heads
        table = torch.view_as_real(rope).float().contiguous()
        _attention_kernel[(rows, self.heads)](
            qkv,
            table,
            write.slots,
            keys,
            values,
            attended,
            self.heads,
            keys.shape[2],
            size**-0.5,
            H=size,
            HALF=triton.next_power_of_2(max(size // 2, 2)),
            BLOCK=64,
            num_warps=4,
        )
        _product(attended, self.out, x, gamma=gamma1, residual=True)
        hidden = x.new_empty(rows, len(self.gate_up) // 2)
        _product(x, self.gate_up, hidden, scale2, shift2, gated=True)
        _product(hidden, self.down, x, gamma=gamma2, residual=True)
        return x


def _product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gamma: Tensor | None = None,
    gated: bool = False,
    residual: bool = False,
) -> None:
    """Writes weight @ x into out (R, N), or adds it times gamma; x is normalised first where there is a scale."""
    rows, width, outs = len(x), weight.shape[1], out.shape[-1]
    outputs, inputs, warps, stages = CUT
    _product_kernel[(triton.cdiv(outs, outputs),)](
        x,
        x if scale is None else scale.contiguous(),
        x if shift is None else shift.contiguous(),
        weight,
        x if gamma is None else gamma.contiguous(),
        out,
        rows,
        width,
        outs,
        width if scale is not None and scale.dim() > 1 else 0,
        EPSILON,
        NORM=scale is not None,
        SHIFT=shift is not None,
        GATED=gated,
        RESIDUAL=residual,
        GAMMA=gamma is not None,
        N=outputs,
        K=inputs,
        num_warps=warps,
        num_stages=stages,
    )
