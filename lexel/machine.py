"""The machine and commit of a measurement: processor or GPU, and the code's version."""

import functools
import platform
import subprocess
from pathlib import Path

import torch


def machine(device: str | torch.device) -> str:
    """The processor or GPU behind a device, with PyTorch's version: "AMD EPYC 9V45, 2 threads, torch 2.13.0"."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    if device.type != "cpu":
        return f"{device.type} of {platform.machine()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        for line in cpu.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name") and ":" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache  # what runs is what was there at first, whatever is checked out later
def commit() -> str | None:
    """The commit of the checkout that Lexel runs from, with "+" where files differ from it; None without a checkout."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        short = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return short + "+" * bool(changed)


def _git(folder: Path, *arguments: str) -> str:
    # Without the lock that `status` takes to write the dates of files anew: one who is killed would leave it behind.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return found.stdout.strip()
