"""A training for as long as you like, over a tiny network: memory, open files and threads may not grow."""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import results
from benchmarks.faults import draw_pictures, recipe
from benchmarks.memory import resident
from lexel.train.tokenizer import train_tokenizer

SAMPLES = 64  # taken over a run
TOLERANCE = 4.0  # MiB of growth that allocators alone may bring


class Use(NamedTuple):
    """What the process holds."""

    memory: float  # MiB
    files: int
    threads: int


def use() -> Use:
    return Use(resident("VmRSS") / 1024, len(list(Path("/proc/self/fd").iterdir())), threading.active_count())


class Soaked(NamedTuple):
    """What a soak found: medians over the second and the last quarter of its samples."""

    steps: int
    seconds: float
    before: Use
    after: Use

    @property
    def grows(self) -> list[str]:
        """What grew."""
        more = self.after.memory - self.before.memory
        found = [f"memory by {more:.1f} MiB"] if more > TOLERANCE else []
        names = ("files", "threads")
        return found + [name for name in names if getattr(self.after, name) > getattr(self.before, name)]


def soak(steps: int, folder: Path, workers: int = 0, hours: float | None = None) -> Soaked:
    """Trains, validates and saves for so many steps or hours, in the real loop.

    Args:
        steps: of a run.
        folder: for the pictures and the run.
        workers: that read pictures.
        hours: the run goes on to more steps until they are over.
    """
    torch.set_num_threads(1)
    pictures = draw_pictures(folder)
    samples: list[Use] = []
    started, total = time.monotonic(), steps
    every = max(1, steps // SAMPLES)

    def progress(now: Any) -> None:
        if now.step % every == 0:
            samples.append(use())

    while True:
        plan = recipe(pictures, total, validate_every=20, save_every=20, workers=workers)
        train_tokenizer(plan, folder / "run", device="cpu", progress=progress)
        seconds = time.monotonic() - started
        if hours is None or seconds > 3600 * hours:
            break
        total += steps
    quarter = len(samples) // 4
    before, after = (
        Use(*(statistics.median(values) for values in zip(*part, strict=True)))
        for part in (samples[quarter : 2 * quarter], samples[-quarter:])
    )
    return Soaked(total, seconds, before, after)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20000, help="of the training")
    parser.add_argument("--hours", type=float, help="go on by as many steps again until so many hours are over")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints what the process held early and late."""
    with tempfile.TemporaryDirectory() as name:
        soaked = soak(arguments.steps, Path(name), arguments.workers, arguments.hours)
    part = {"commit": results.commit(), "machine": results.machine("cpu", 1), **soaked._asdict()}
    lines = section(part)
    print("\n".join([*lines, "", f"grows: {', '.join(soaked.grows) or 'nothing'}"]))
    if arguments.write:
        figures = {**results.read(results.PAGE), "soak": part}
        results.write(results.PAGE, figures, "soak", lines)


def section(part: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    rows = [
        f"| {quarter} | {memory:.1f} | {files:g} | {threads:g} |"
        for quarter, (memory, files, threads) in (("second", part["before"]), ("last", part["after"]))
    ]
    return [
        f"`python -m benchmarks soak`: {part['steps']:,} steps of a tiny network in the real loop, a validation and a "
        f"checkpoint every 20, {part['seconds']:,.0f} s, commit {part['commit']}, {part['machine']}.",
        "",
        "| quarter of the run | resident MiB | open files | threads |",
        "|---|---|---|---|",
        *rows,
    ]
