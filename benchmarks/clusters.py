"""Approximate search in clusters of codes beside the exact search: time, and how often it misses the best code.

Latents and codes are drawn around the same 64 points, one unit apart from them in each dimension: tables that are
trained have such structure; a table without any would be missed more often.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import results
from lexel.kernels import ClusterIndex, nearest

SHAPES = [(1024, 16384, 256), (1024, 262144, 32), (1024, 262144, 256)]
PROBES = (1, 4, 8, 16)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each, interleaved")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for row in measured(*shape, arguments.repeat)]
    part = {"commit": results.commit(), "machine": results.machine("cpu", 1), "rows": rows}
    print("\n".join(section(part)))
    if arguments.write:
        results.write(results.PAGE, {**results.read(results.PAGE), "clusters": part}, "clusters", section(part))


def measured(rows: int, size: int, dim: int, repeat: int) -> list[dict[str, Any]]:
    """One row a number of probes: medians of processor time against the exact search's, and the misses."""
    draw = torch.Generator().manual_seed(0)
    points = 2 * torch.randn(64, dim, generator=draw)
    table, z = (
        points[torch.randint(64, (count,), generator=draw)] + torch.randn(count, dim, generator=draw)
        for count in (size, rows)
    )
    started = time.process_time()
    index = ClusterIndex(table)
    build = time.process_time() - started
    exact, taken = [], {probes: list[float]() for probes in PROBES}
    for _ in range(repeat):
        exact.append(clock(lambda: nearest(z, table)))
        for probes in PROBES:
            index.probes = probes
            taken[probes].append(clock(lambda: index.nearest(z)))
    missed = {}
    for probes in PROBES:
        index.probes = probes
        missed[probes] = index.miss_rate(z)
    return [
        {
            "shape": [rows, size, dim],
            "probes": probes,
            "build": build,
            "exact": statistics.median(exact),
            "seconds": statistics.median(taken[probes]),
            "missed": missed[probes],
        }
        for probes in PROBES
    ]


def clock(job: Callable[[], object]) -> float:
    """Seconds of processor time."""
    started = time.process_time()
    job()
    return time.process_time() - started


def section(part: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        "`python -m benchmarks clusters`: approximate search (`lexel.kernels.ClusterIndex`, sqrt(K) clusters) beside "
        "the exact `nearest`, processor time. Latents and codes around the same 64 points. Commit "
        f"{part['commit']}, {part['machine']}.",
        "",
        "| N x K x D | clusters looked through | exact | approximate | times as fast | misses | index made in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        shape = " x ".join(f"{side:,}" for side in row["shape"])
        lines.append(
            f"| {shape} | {row['probes']} | {1000 * row['exact']:.0f} ms | {1000 * row['seconds']:.0f} ms | "
            f"{row['exact'] / row['seconds']:.1f} | {row['missed'] * row['shape'][0]:.0f} of {row['shape'][0]:,} | "
            f"{row['build']:.1f} s |"
        )
    return lines
