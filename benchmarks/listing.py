"""Image files in class folders on a disk: listed and labelled beside walking the tree, shuffled, gone on with.

The files are hard links to one picture of 8 x 8, a thousand a folder; a file system holds many names for little space.
Every measurement is made in a process of its own, after one walk that fills the kernel's caches; walking and listing
take turns. Linux only: memory is read from /proc.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.memory import resident

IN_A_FOLDER = 1_000
LINKS = 30_000  # names of one file; ext4 allows 65,000


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; medians are reported")
    parser.add_argument("--folder", type=Path, help="where the files are made, and deleted again; a temporary folder")
    parser.add_argument("--out", type=Path, help="the page to write the table to")
    parser.add_argument("--measure", choices=("walk", "os.walk", "list"), help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)


def make(folder: Path, count: int) -> None:
    """So many names of tiny pictures in class folders."""
    import numpy as np
    from PIL import Image

    picture = folder.parent / "picture.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    for number in range(count):
        if number % LINKS == 0:
            source = folder.parent / f"{number}.png"
            shutil.copy(picture, source)
        if number % IN_A_FOLDER == 0:
            below = folder / f"class{number // IN_A_FOLDER:05d}"
            below.mkdir(parents=True)
        os.link(source, below / f"picture-{number:08d}.png")


def scan(path: str) -> int:
    """Files below a folder, counted with nothing kept: the least that a listing must do."""
    count = 0
    with os.scandir(path) as entries:
        for entry in entries:
            count += scan(entry.path) if entry.is_dir(follow_symlinks=False) else 1
    return count


def timed(what: str, tree: Path) -> dict[str, float]:
    """Seconds of one core and MiB of this process, which does nothing else."""
    from lexel.data.folder import open_folder
    from lexel.data.options import OpenOptions
    from lexel.data.order import Positions

    gc.collect()
    gc.freeze()  # else the first collection looks through all of PyTorch, a tenth of a second that is the imports'
    before, begun = resident("VmRSS"), time.process_time()
    taken: dict[str, float] = {}
    if what == "walk":
        scan(str(tree))
    elif what == "os.walk":
        sum(len(files) for _, _, files in os.walk(tree))
    else:
        images = open_folder(tree, OpenOptions())
        assert images.labels is not None
        assert images.labels[-1] == len(images.classes) - 1
    taken["seconds"] = time.process_time() - begun
    taken["MiB"] = (resident("VmRSS") - before) / 1024
    if what == "list":
        begun = time.process_time()
        order = Positions(len(images), seed=0)
        _ = [order[position] for position in range(64)]
        taken["shuffled"] = time.process_time() - begun
        begun = time.process_time()
        order = Positions(len(images), seed=0)
        _ = [order[position] for position in range(3 * len(images) // 2, 3 * len(images) // 2 + 64)]
        taken["resumed"] = time.process_time() - begun
    return taken


def measured(tree: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of what fresh processes tell, which take turns."""
    taken: dict[str, list[dict[str, float]]] = {"walk": [], "os.walk": [], "list": []}
    for turn in range(repeats + 1):
        for what, told in taken.items():
            command = [sys.executable, "-m", "benchmarks", "listing", "--measure", what, "--tree", str(tree)]
            one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if turn:  # the first fills the kernel's caches
                told.append(one)
    return {
        what: {field: round(statistics.median(one[field] for one in told), 4) for field in told[0]}
        for what, told in taken.items()
    }


def section(figures: dict[str, Any]) -> list[str]:
    """The table of RESULTS.md."""
    lines = [
        "## Files listed",
        "",
        f"{figures['machine']}, commit {figures['commit']}, `python -m benchmarks listing`: files in folders of"
        f" {IN_A_FOLDER:,}, each a class; processor seconds of one core, medians of {figures['repeats']} runs that take"
        " turns, each in a process of its own, the kernel's caches filled. *Walked* is a bare recursion of `os.scandir`"
        " that keeps nothing; *listed* is `open_folder`: names kept, sorted and labelled. *Gone on* is the order in the"
        " middle of the second epoch. Bar: listed within 2 times the walk.",
        "",
        "| files | walked | `os.walk` | listed and labelled | times the walk | MiB held | shuffled | gone on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, one in figures["files"].items():
        walk, listed = one["walk"]["seconds"], one["list"]
        lines.append(
            f"| {int(count):,} | {walk:.3f} s | {one['os.walk']['seconds']:.3f} s | {listed['seconds']:.3f} s"
            f" | {listed['seconds'] / walk:.2f} | {listed['MiB']:.1f} | {listed['shuffled']:.3f} s"
            f" | {listed['resumed']:.3f} s |"
        )
    return lines


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it with --out."""
    if arguments.measure:
        print(json.dumps(timed(arguments.measure, arguments.tree)))
        return
    files: dict[str, Any] = {}
    for count in arguments.files:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make(Path(folder) / "tree", count)
            files[str(count)] = measured(Path(folder) / "tree", arguments.repeats)
    figures = {
        "machine": results.machine("cpu", 1),
        "commit": results.commit(),
        "repeats": arguments.repeats,
        "files": files,
    }
    results.show(arguments.out, "listing", figures, section(figures))
