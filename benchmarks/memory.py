"""The peak of one method in a fresh process, in MiB; `python -m benchmarks quantizers` starts it."""

import argparse
from pathlib import Path

import torch

from benchmarks import peers


def peak(name: str, rows: int, size: int, dim: int, device: str, checkout: Path | None = None) -> float:
    """MiB beyond the inputs at the peak of one pass in this process."""
    torch.set_num_threads(1)
    small = peers.Case(64, 64, dim, device)
    peers.work(name, small, checkout)()  # libraries load their parts on first use
    case = peers.Case(rows, size, dim, device)
    job = peers.work(name, case, checkout)
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("method")
    parser.add_argument("shape", type=int, nargs=3, help="N, K, D")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", type=Path, help="a checkout of SEED-Voken")
    arguments = parser.parse_args()
    rows, size, dim = arguments.shape
    print(peak(arguments.method, rows, size, dim, arguments.device, arguments.peer))


if __name__ == "__main__":
    main()
