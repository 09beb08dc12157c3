"""Kernels started and bytes asked for by the Triton kernels of index backpropagation, counted without a GPU.

    python -m benchmarks traffic [--rows 4096] [--sizes 16384,65536,262144] [--dim 256]

The functions of the package run on the meta device, where nothing is computed, and what they would start is written
down with its grid and its arguments. What a kernel reads and writes follows from these by the formulas below, which the
tests hold to the loads and stores that Triton's interpreter makes. Bytes are those that programs ask for: codes that
stream past come out of the second-level cache for all but the first.
"""

import argparse
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import results

# KiB of shared memory that a block may take, and the operations a second that products of bfloat16 numbers reach: on an
# H100 560 to 650e12 were measured (docs/studies/log.md), of 989e12 stated; the A100 is given the same share of 312e12.
CARDS = {"H100, H200": (227, 600e12), "A100": (163, 190e12)}
NEAR = 2.0  # groups of codes within the bound of a row's best, on the H100's runs one or two


class Launch(NamedTuple):
    """A kernel that was started: its name, how many programs by axis, its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Traffic(NamedTuple):
    """What a launch asks the memory for, and the multiplications and additions of its products."""

    read: float
    written: float
    flop: float


def traffic(launch: Launch, near: float = NEAR, listed: float = 1.0) -> Traffic:
    """Bytes and operations of a launch.

    Args:
        launch: of a kernel in `FORMULAS`.
        near: groups a row that are looked at again.
        listed: codes a row that are near the best.
    """
    return FORMULAS[launch.kernel](launch.arguments, launch.grid, near, listed)


def _prepare(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    return Traffic(4 * a["size"] * a["dim"], 2 * a["size"] * a["dim"] + 8 * a["size"], 0)


def _bounds(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    return Traffic(4 * a["count"] * a["dim"] + 12 * grid[0], 2 * a["count"] * a["dim"] + 12 * a["count"], 0)


def _maxima(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    # Rows stay for all tiles of a program, or are read again for every product; all codes stream past every block.
    again = grid[1] if a["WHOLE"] else a["all_tiles"] * a["MEMBERS"]
    bias = 4 * grid[0] * a["size"] if a["BIAS"] else 0
    read = 2 * a["dim"] * (a["count"] * again + grid[0] * a["size"]) + bias
    return Traffic(read, 4 * a["count"] * a["groups"], 2 * a["count"] * a["size"] * a["dim"])


def _groups(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    return Traffic(grid[0] * (8 * a["groups"] + 4), grid[0] * 4 * (near + 1), 0)


def _list(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    members = near * a["GROUP"]
    codes = 4 * near * a["dim"] + 4 * members * a["dim"] + (8 * members if a["BIAS"] else 0)
    read = 4 + 4 * near + codes + 12 * members + 8 + 8 * listed
    return Traffic(grid[0] * read, grid[0] * (8 * members + 16 * a["WIDTH"] + 9), 0)


def _statistics(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    tables = 1 if a["SAME"] else 2
    bias = 4 * grid[0] * a["size"] if a["BIAS"] else 0
    read = 2 * a["dim"] * (2 * a["count"] * grid[1] + tables * grid[0] * a["size"]) + bias
    return Traffic(read, 12 * a["count"] * grid[1], 4 * a["count"] * a["size"] * a["dim"])


def _slope(a: dict[str, Any], grid: tuple[int, ...], near: float, listed: float) -> Traffic:
    tables, codes = 1 if a["SAME"] else 2, min(a["size"] - a["first"], grid[1] * a["tiles"] * a["K"])
    bias = 4 * grid[0] * codes if a["BIAS"] else 0
    read = 2 * a["dim"] * (2 * a["count"] * grid[1] + tables * grid[0] * codes) + 12 * a["count"] * grid[1] + bias
    return Traffic(read, 2 * a["count"] * a["width"], 4 * a["count"] * a["width"] * a["dim"])


FORMULAS: dict[str, Callable[[dict[str, Any], tuple[int, ...], float, float], Traffic]] = {
    "_prepare_kernel": _prepare,
    "_bounds_kernel": _bounds,
    "_maxima_kernel": _maxima,
    "_groups_kernel": _groups,
    "_list_kernel": _list,
    "_statistics_kernel": _statistics,
    "_slope_kernel": _slope,
}


class _Recorded:
    """Stands for a kernel: writes down how it is started, and starts it if asked to."""

    def __init__(self, kernel: Any, launches: list[Launch], start: bool) -> None:
        self.kernel, self.launches, self.start = kernel, launches, start

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            names = inspect.signature(self.kernel.fn)
            own = {name: value for name, value in options.items() if name in names.parameters}
            given = names.bind(*arguments, **own).arguments
            self.launches.append(Launch(self.kernel.fn.__name__, grid, dict(given)))
            if self.start:
                self.kernel[grid](*arguments, **options)

        return launch


@contextmanager
def recorded(start: bool) -> Iterator[list[Launch]]:
    """The launches of the search's and the gradient's kernels; without `start` nothing is computed."""
    from lexel.kernels import triton_search, triton_softmax

    launches: list[Launch] = []
    kept = [(module, name) for module in (triton_search, triton_softmax) for name in FORMULAS if hasattr(module, name)]
    kernels = [getattr(module, name) for module, name in kept]
    for (module, name), kernel in zip(kept, kernels, strict=True):
        setattr(module, name, _Recorded(kernel, launches, start))
    try:
        yield launches
    finally:
        for (module, name), kernel in zip(kept, kernels, strict=True):
            setattr(module, name, kernel)


class _Operations(TorchDispatchMode):
    """Counts PyTorch's own operations that start a kernel: all but views and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        view = any(argument.alias_info and not argument.alias_info.is_write for argument in operation._schema.arguments)
        self.count += not view and "empty" not in operation.__name__
        return found


def count(rows: int, size: int, dim: int, memory: int) -> dict[str, Any]:
    """Launches, bytes and operations of the search and of the gradient through the softmax, for one shape.

    Args:
        rows, size, dim: N, K and D.
        memory: KiB of shared memory that a block may take, which chooses the tiles.
    """
    from lexel.kernels import triton_search, triton_softmax, triton_tiles
    from lexel.kernels.inputs import Inputs
    from lexel.kernels.rounding import APART, GROUP
    from lexel.kernels.search import WIDTH

    z, codes, g = (torch.empty(length, dim, device="meta") for length in (rows, size, rows))
    products: list[tuple[int, ...]] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        products.append((*a.shape, b.shape[1]))
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    shapes = dict(triton_tiles.SHAPES)
    kept = triton_softmax._product
    figures: dict[str, Any] = {}
    try:
        triton_softmax._product = product
        for larger in [each for each in shapes if each > memory]:
            del triton_tiles.SHAPES[larger]
        with recorded(start=False) as launches:
            with _Operations() as operations:
                low, lengths, losses = triton_search.prepare(codes)
                prepared = (low, lengths.amax(), losses.amax())
                short, below, ties = triton_search.bounds(z, *prepared[1:], z.new_empty(()), 0.0)
                maxima = triton_search.group_maxima(short, low, None, GROUP, APART)
                listed, found = triton_search.near_groups(maxima, below, triton_search.GROUPS)
                triton_search.list_codes(z, codes, None, ties, listed, found, 0.0, GROUP, APART, WIDTH)
            figures["search"] = _summed(launches, operations.count, [])
            launches.clear()
            with _Operations() as operations:
                triton_softmax.soft(Inputs(z, codes, None, False, 1.0, 0.01, False, 16, 1, 1, True), g, None)
            figures["gradient"] = _summed(launches, operations.count, products)
    finally:
        triton_softmax._product = kept
        triton_tiles.SHAPES.clear()
        triton_tiles.SHAPES.update(shapes)
    return figures


def _summed(launches: list[Launch], operations: int, products: list[tuple[int, ...]]) -> dict[str, float]:
    each = [traffic(launch) for launch in launches]
    return {
        "kernels": len(launches),
        "operations": operations + len(products),
        "read": sum(one.read for one in each) + sum(2 * (n * k + k * m) for n, k, m in products),
        "written": sum(one.written for one in each) + sum(4 * n * m for n, _, m in products),
        "flop": sum(one.flop for one in each) + sum(2 * math.prod(shape) for shape in products),
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--sizes", default="16384,65536,262144", help="numbers of codes, separated by commas")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--out", type=Path, default=results.PAGE, help="the page; figures lie beside it as .json")


def run(arguments: argparse.Namespace) -> None:
    """Counts every shape for every kind of card."""
    figures: dict[str, Any] = {"commit": results.commit(), "shapes": {}}
    for size in map(int, arguments.sizes.split(",")):
        shape = f"{arguments.rows} x {size} x {arguments.dim}"
        figures["shapes"][shape] = {
            card: count(arguments.rows, size, arguments.dim, memory) for card, (memory, _) in CARDS.items()
        }
    results.show(arguments.out, "traffic", figures, section(figures))


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        "`python -m benchmarks traffic`, without a GPU: what the Triton kernels of the search and of the gradient",
        "through the softmax start (Lexel's kernels + operations of PyTorch's own), and GB that their programs ask for",
        "(the tests hold the formulas to what Triton's interpreter loads and stores). *Predicted*: the products at the",
        "rate that they reach on an H100 (600 TFLOP/s; the same share on the others), in milliseconds, to be compared",
        f"with what is measured. Commit {figures['commit']}.",
        "",
        "| N x K x D | card | part | started | GB read | GB written | TFLOP | predicted ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, cards in figures["shapes"].items():
        for card, parts in cards.items():
            for part, found in parts.items():
                started = f"{found['kernels']} + {found['operations']}"
                numbers = f"{found['read'] / 1e9:.2f} | {found['written'] / 1e9:.3f} | {found['flop'] / 1e12:.2f}"
                predicted = found["flop"] / CARDS[card][1] * 1e3
                lines.append(f"| {shape} | {card} | {part} | {started} | {numbers} | {predicted:.2f} |")
    return lines
