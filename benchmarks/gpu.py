"""Everything that only a GPU can tell, in parts that each end within minutes; each saves its figures as it ends.

    python -m benchmarks gpu --out DIR [--parts tests kernels ...] [--seconds 420] [--data photographs.tar] [--tiny]

Needs torch, Triton, pytest and Lexel's own requirements. A part is a process of its own: one that fails or runs late
leaves the others alone. `python -m benchmarks results --gpu DIR` takes the figures in.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results

# Most valuable first: name, what it measures, how long it may take.
PARTS: dict[str, tuple[str, float]] = {
    "tests": ("pytest -m gpu", 180),
    "kernels": ("search and index backpropagation beside dense, and their errors against float64", 240),
    "step": ("the paper's tokenizers: a training step with 16,384 and 262,144 codes, and with plain VQ", 240),
    "sampling": ("generators B to XXL: milliseconds a position, beside reading the weights", 240),
    "learning": ("generators B to XXL: a training step", 180),
    "bulk": ("encoding and evaluating pictures: images a second", 180),
    "tuning": ("how the kernels may be cut: what SHAPES holds for this card", 240),
    "training": ("a tokenizer on photographs, with its report", 480),
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="where a file for each part goes")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=1200, help="for all of it: parts that come too late are left")
    parser.add_argument("--train-seconds", type=float, default=240, help="for the training")
    parser.add_argument("--data", help="a source of pictures, for bulk and training: a tar file or a folder")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="small numbers, on a CPU too: does it run?")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # this process is the part


def run(arguments: argparse.Namespace) -> None:
    """Runs each part in a process of its own, or the one part that this process is; fails where one failed."""
    if not (torch.cuda.is_available() or arguments.tiny):
        raise SystemExit("the gpu benchmark needs a CUDA device; --tiny runs a small one anywhere")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.alone:
        _part(arguments.parts[0], arguments)
        return
    begun, failed = time.monotonic(), list[str]()
    for name in arguments.parts:
        left = arguments.seconds - (time.monotonic() - begun)
        if left < 20:
            print(f"{name}: left out, no time", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks", "gpu", *_given(arguments), "--parts", name, "--alone"]
        started = time.monotonic()
        try:
            code: int | str = subprocess.run(command, check=False, timeout=min(left, PARTS[name][1])).returncode
        except subprocess.TimeoutExpired:
            code = "stopped"  # what it had saved stays
        print(f"{name}: {code}, {time.monotonic() - started:.0f} s", flush=True)
        failed += [name] if code else []
    if failed:
        raise SystemExit(f"not to the end: {', '.join(failed)}; what they had measured is saved")


def _given(arguments: argparse.Namespace) -> list[str]:
    given = ["--out", str(arguments.out), "--train-seconds", str(arguments.train_seconds)]
    for name in ("data", "commit"):
        value = getattr(arguments, name)
        given += [f"--{name}", value] if value else []
    return given + (["--tiny"] if arguments.tiny else [])


def _part(name: str, arguments: argparse.Namespace) -> None:
    """Runs a part, which saves what it has found after every figure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "commit": arguments.commit or results.commit(),
        "machine": results.machine(device, torch.get_num_threads()),
        "tiny": arguments.tiny,
    }
    figures: dict[str, Any] = {}

    def save(key: str, value: Any) -> None:
        figures[key] = value
        print(f"{name}: {key}: {json.dumps(value)}", flush=True)
        path = arguments.out / f"{name}.json"
        path.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n", encoding="utf-8")

    if name == "tests":
        _tests(save, arguments)
        return
    module = importlib.import_module(
        "benchmarks.gpu_kernels" if name in ("kernels", "tuning") else "benchmarks.gpu_models"
    )
    work: Callable[..., None] = getattr(module, name)
    work(save, device, arguments)


def _tests(save: Callable[[str, Any], None], arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    command += [
        "-m",
        "gpu",
        "-n",
        "4",
        "--timeout",
        "150",
        "--durations",
        "5",
        "--continue-on-collection-errors",
        "tests",
    ]
    if arguments.tiny:
        command += ["-n", "0", "--collect-only"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    (arguments.out / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    result = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "did not run")
    save("pytest -m gpu", {"result": result.strip("= "), "seconds": round(time.monotonic() - begun)})
    if done.returncode:
        print("\n".join(lines[-60:]), flush=True)


def milliseconds(job: Callable[[], Any], device: str, repeats: int = 9, warm: int = 2) -> float:
    """The median time of a call."""
    for _ in range(warm):
        job()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            job()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            job()
            times.append((time.perf_counter() - started) * 1e3)
    return sorted(times)[len(times) // 2]


def peak_mib(job: Callable[[], Any], device: str) -> float | None:
    """The most memory that a call takes beyond what was in use; None without a GPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
