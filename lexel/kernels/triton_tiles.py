"""Tiles of the Triton kernels: sizes for each card, and reads of rows."""
# mypy: ignore-errors
# (kernels are not Python to a type checker)

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter multiplies bits of bfloat16 numbers
LARGEST_DIM = 256  # numbers of a row that stay in shared memory; longer rows take the way of plain tiles
PROGRAMS = 264  # enough to fill a large card twice


class Tiles(NamedTuple):
    """Tile sizes of a kernel: rows that stay, codes that stream past, and Triton's own options."""

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
def operand(x):
    """Operands of a product in half precision."""
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def rows_of(table, rows, count, columns, dim, D: tl.constexpr):
    """table[rows, :D], zero where a row or column is out of range."""
    inside = (rows < count)[:, None] & (columns < dim)[None, :]
    return tl.load(table + rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=inside, other=0.0)


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
