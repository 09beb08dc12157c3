"""The precisions that codes are scanned in, beside float32: the same codes to the bit, and the time of each.

Latents and codes are drawn from a normal distribution and have none of the structure that training gives.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from lexel.kernels.scores import minus_squares
from lexel.kernels.search import near_codes

SHAPES = [(1024, 16384, 256), (1024, 65536, 256), (1024, 262144, 256), (1024, 16384, 64), (1024, 262144, 32)]
SCANS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=5, help="rounds, in each of which all precisions take their turn")
    parser.add_argument("--out", type=Path, help="the page to write the table to")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table; fails where two precisions find different codes."""
    torch.set_num_threads(1)
    rows = [measured(shape, distance, arguments.repeat) for shape in SHAPES for distance in (False, True)]
    figures = {"commit": results.commit(), "machine": results.machine("cpu", 1), "rows": rows}
    results.show(arguments.out, "scans", figures, section(figures))


def measured(shape: tuple[int, int, int], distance: bool, repeat: int) -> dict[str, Any]:
    """Seconds of processor time of each precision in each round, by dot products or by distance."""
    draw = torch.Generator().manual_seed(0)
    count, size, dim = shape
    z, codes = (torch.randn(rows, dim, generator=draw) for rows in (count, size))
    bias = minus_squares(codes) if distance else None
    found = {name: near_codes(z, codes, bias, scan=scan).best for name, scan in SCANS.items()}
    for name, indices in found.items():
        if not torch.equal(indices, found["float32"]):
            raise AssertionError(f"a scan in {name} finds other codes than one in float32")
    seconds: dict[str, list[float]] = {name: [] for name in SCANS}
    for each in range(repeat):
        for turn in range(len(SCANS)):  # what comes first in a round seems slower, so all come first
            name = [*SCANS][(each + turn) % len(SCANS)]
            started = time.process_time()
            near_codes(z, codes, bias, scan=SCANS[name])
            seconds[name].append(time.process_time() - started)
    return {"shape": list(shape), "distance": distance, "seconds": seconds}


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        "`python -m benchmarks scans`: the exact search by its scan, processor time, medians of rounds; random latents "
        "and codes, the same indices to the bit in all. *Times as fast* as in float32, in the same rounds. Commit "
        f"{figures['commit']}, {figures['machine']}.",
        "",
        "| N x K x D | by | float32 | bfloat16 | int8 | bfloat16, times as fast | int8, times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        taken = row["seconds"]
        times = [f"{1000 * statistics.median(taken[name]):,.0f} ms" for name in SCANS]
        ratios = [
            f"{statistics.median(map(float.__truediv__, taken['float32'], taken[name])):.2f}" for name in [*SCANS][1:]
        ]
        shape = " x ".join(f"{side:,}" for side in row["shape"])
        by = "distance" if row["distance"] else "dot product"
        lines.append(f"| {shape} | {by} | {' | '.join([*times, *ratios])} |")
    return lines
