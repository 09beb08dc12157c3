"""Time and peak memory of forward + backward and of encoding, ours beside the peers; one table in RESULTS.md."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, results

TIMED = [name for name in [*peers.STEPS, *peers.ENCODERS] if name != "lexel, entropy, 16 rows"]
WEIGHED = list(peers.STEPS)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1024, 4096], help="numbers of latents, N")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 16384, 65536, 262144], help="codebook sizes, K")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="methods that would need more are left out")
    parser.add_argument("--repeats", type=int, help="rounds; by default 9 for small shapes down to 1 for the largest")
    parser.add_argument("--parts", nargs="*", default=["time", "memory"], choices=["time", "memory"])
    parser.add_argument("--peer", type=Path, help="a checkout of SEED-Voken: its class is measured too")
    parser.add_argument("--out", type=Path, default=results.PAGE, help="figures go beside it as .json")


def run(arguments: argparse.Namespace) -> None:
    """Measures what is asked for, keeps every figure in a JSON file and writes the table after each shape."""
    torch.set_num_threads(arguments.threads)
    figures = results.read(arguments.out)
    for size in arguments.sizes:
        for rows in arguments.rows:
            shape = f"{rows} x {size} x {arguments.dim}"
            entry = figures.setdefault(arguments.device, {}).setdefault(shape, {"ms": {}, "MiB": {}})
            entry["commit"] = results.commit()
            entry["machine"] = results.machine(arguments.device, arguments.threads)
            if "time" in arguments.parts:
                entry["ms"].update(times(rows, size, arguments))
            if "memory" in arguments.parts:
                entry["MiB"].update(memories(rows, size, arguments))
            results.write(arguments.out, figures, "quantizers", section(figures))
            print(shape, json.dumps(entry["ms"]), json.dumps(entry["MiB"]), flush=True)


def times(rows: int, size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each method: processor time on a CPU (threads added up), interleaved in one process."""
    case = peers.Case(rows, size, arguments.dim, arguments.device)
    names = [name for name in TIMED if can_run(name, rows, size, arguments)]
    jobs = {name: peers.work(name, case, arguments.peer) for name in names}
    repeats = arguments.repeats or max(1, min(9, 2**28 // (rows * size)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if rows * size <= 2**26:  # warm-up; the large shapes take long enough not to need one
        for job in jobs.values():
            job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = clock(arguments.device)
            job()
            seconds[name].append(clock(arguments.device) - start)
    return {name: round(1000 * statistics.median(values), 1) for name, values in seconds.items()}


def can_run(name: str, rows: int, size: int, arguments: argparse.Namespace) -> bool:
    """Whether a method has the code and the memory that it needs."""
    there = arguments.peer is not None or name not in peers.OF_CHECKOUT
    return there and peers.gigabytes(name, rows, size) <= arguments.gigabytes


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memories(rows: int, size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory beyond the inputs of one pass, the codebook's gradient included, each in a fresh process."""
    found = {}
    for name in WEIGHED:
        if not can_run(name, rows, size, arguments):
            continue
        shape = [str(number) for number in (rows, size, arguments.dim)]
        command = [sys.executable, "-m", "benchmarks.memory", name, *shape, "--device", arguments.device]
        command += ["--peer", str(arguments.peer)] if arguments.peer else []
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = []
    for device, shapes in figures.items():
        if device not in ("cpu", "cuda"):  # figures of other benchmarks
            continue
        machines = sorted({entry["machine"] for entry in shapes.values()})
        commits = sorted({entry["commit"] for entry in shapes.values()})
        lines += [f"Device `{device}`: {'; '.join(machines)}. Commit {', '.join(commits)}.", ""]
        lines += ["Milliseconds (median); in brackets, how many times lexel's time with the same terms:", ""]
        lines += table(shapes, "ms", TIMED)
        lines += ["", "Peak MiB beyond the inputs, the gradient of the codebook included:", ""]
        lines += table(shapes, "MiB", WEIGHED)
        lines.append("")
    if "cuda" not in figures:
        lines += ["On a GPU: see [GPU](#gpu)." if "gpu" in figures else "Device `cuda`: not measured."]
    return lines


def table(shapes: dict[str, Any], unit: str, names: list[str]) -> list[str]:
    """One row a shape, one column a method."""
    names = [name for name in names if any(name in entry[unit] for entry in shapes.values())]
    rows = ["| N x K x D | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for shape, entry in shapes.items():
        cells = []
        for name in names:
            value = entry[unit].get(name)
            ours = entry[unit].get("lexel, entropy" if "entropy" in name else "lexel")
            if name.startswith(("encode", "1 ")):
                ours = entry[unit].get("encode: lexel dot")
            if value is None:
                cells.append("-")
            elif name.startswith(("lexel", "encode: lexel")) or not ours:
                cells.append(f"{value:.0f}")
            else:
                cells.append(f"{value:.0f} ({value / ours:.2f})")
        if entry[unit]:
            rows.append(f"| {shape} | " + " | ".join(cells) + " |")
    return rows
