"""Time and peak memory of forward + backward and of encoding, ours beside the peers; one table in RESULTS.md."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import peers

TIMED = [name for name in [*peers.STEPS, *peers.ENCODERS] if name != "lexel, entropy, 16 rows"]
WEIGHED = list(peers.STEPS)


def run(arguments: argparse.Namespace) -> None:
    """Measures what is asked for, keeps every figure in a JSON file and writes the table after each shape."""
    torch.set_num_threads(arguments.threads)
    store = arguments.out.with_suffix(".json")
    figures = json.loads(store.read_text()) if store.exists() else {}
    for size in arguments.sizes:
        for rows in arguments.rows:
            shape = f"{rows} x {size} x {arguments.dim}"
            entry = figures.setdefault(arguments.device, {}).setdefault(shape, {"ms": {}, "MiB": {}})
            entry["commit"], entry["machine"] = commit(), machine(arguments.device, arguments.threads)
            if "time" in arguments.parts:
                entry["ms"].update(times(rows, size, arguments))
            if "memory" in arguments.parts:
                entry["MiB"].update(memories(rows, size, arguments))
            store.write_text(json.dumps(figures, indent=1) + "\n")
            write(figures, arguments.out)
            print(shape, json.dumps(entry["ms"]), json.dumps(entry["MiB"]), flush=True)


def times(rows: int, size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each method: processor time on a CPU (threads added up), interleaved in one process."""
    case = peers.Case(rows, size, arguments.dim, arguments.device)
    names = [name for name in TIMED if peers.gigabytes(name, rows, size) <= arguments.gigabytes]
    jobs = {name: peers.work(name, case) for name in names}
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


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memories(rows: int, size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory beyond the inputs of one pass, the codebook's gradient included, each in a fresh process."""
    found = {}
    for name in WEIGHED:
        if peers.gigabytes(name, rows, size) > arguments.gigabytes:
            continue
        shape = [str(number) for number in (rows, size, arguments.dim)]
        command = [sys.executable, "-m", "benchmarks", "memory", name, *shape, "--device", arguments.device]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def peak(name: str, rows: int, size: int, dim: int, device: str) -> float:
    """MiB beyond the inputs at the peak of one pass in this process."""
    torch.set_num_threads(1)
    small = peers.Case(64, 64, dim, device)
    peers.work(name, small)()  # libraries load their parts on first use
    case = peers.Case(rows, size, dim, device)
    job = peers.work(name, case)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    job()
    return round((resident("VmHWM") - before) / 1024, 1)


def resident(field: str) -> int:
    """KiB, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def machine(device: str, threads: int) -> str:
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = "x86"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    count = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{name} ({platform.machine()}, {bf16} AVX512-BF16), {count}, torch {torch.__version__}"


def write(figures: dict, out: Path) -> None:
    """The table, between two markers, so that other sections of the page stay."""
    lines = []
    for device, shapes in figures.items():
        if device == "step":
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
        lines += ["Device `cuda`: not measured; no GPU was at hand.", ""]
    start, end = "<!-- quantizers -->", "<!-- end of quantizers -->"
    text = out.read_text() if out.exists() else "# Results\n"
    if start not in text:
        text += f"\n{start}\n{end}\n"
    head, rest = text.split(start)
    out.write_text(head + start + "\n" + "\n".join(lines).rstrip() + "\n" + end + rest.split(end)[1])


def table(shapes: dict, unit: str, names: list[str]) -> list[str]:
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
