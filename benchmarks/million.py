"""A million pictures in tar shards: listed, shuffled, encoded in two parts of which one is killed, resumed, merged.

The pictures have 8 pixels a side and the tokenizer a few thousand weights, so that the time is that of the data's way.
"""

import argparse
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks import results
from benchmarks.memory import resident
from lexel.config import check
from lexel.data import TRANSFORMS, open_images, training_batches
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import train_tokenizer

SIDE, IN_A_SHARD, CLASSES = 8, 10_000, 1000
KINDS = 200  # different pictures; each file is one of them, so that files differ and cost little to make
SHARD_SIZE = 4096


class Command(NamedTuple):
    """What a command took."""

    seconds: float
    peak: float  # MiB resident at most
    status: int


def draw(folder: Path, pictures: int) -> Path:
    """Tar shards of little PNG files, each with its class."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(KINDS):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
        drawn.append(buffer.getvalue())
    for first in range(0, pictures, IN_A_SHARD):
        with tarfile.open(folder / f"shard-{first // IN_A_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + IN_A_SHARD, pictures)):
                for ending, data in (
                    ("png", drawn[generator.integers(KINDS)]),
                    ("cls", str(generator.integers(CLASSES)).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def tokenizer(folder: Path, pictures: Path) -> Path:
    """A run of two steps."""
    autoencoder = {"width": 4, "multipliers": [1, 2], "residual_blocks": 1, "attention_levels": []}
    tables = {
        "model": {
            "quantizer": {"kind": "ibq", "codebook_size": 256, "codebook_dim": 4},
            "autoencoder": {**autoencoder, "middle_attention": False, "z_channels": 4, "groups": 2},
        },
        "data": {"source": f"tar:{pictures}/shard-00000.tar", "size": SIDE, "validation": 0.01},
        "train": {"steps": 2, "batch_size": 8, "lr": 1e-3, "weights": {"l1": 1.0}, "validation_images": 8},
    }
    train_tokenizer(check(tables, TokenizerRecipe, "million"), folder, device="cpu")
    return folder


def measured(action: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What an action gives in a fresh process, and MiB that it takes there beyond what is imported: peak and left."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(action, arguments, theirs))
    process.start()
    theirs.close()
    found = mine.recv()
    process.join()
    return found


def _measured(action: Callable[..., dict[str, float]], arguments: Sequence[Any], pipe: Any) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    found = action(*arguments)
    left, peak = resident("VmRSS") - before, resident("VmHWM") - before
    pipe.send({**found, "peak MiB": round(peak / 1024, 1), "left MiB": round(left / 1024, 1)})


def listed(pictures: Path) -> dict[str, float]:
    """Opens the shards."""
    started = time.perf_counter()
    images = open_images(f"tar:{pictures}")
    seconds = time.perf_counter() - started
    _KEPT.append(images)  # so that what is left in memory holds it
    return {"seconds": round(seconds, 2), "pictures": len(images)}


def shuffled(pictures: Path) -> dict[str, float]:
    """Seconds to the first batch in the middle of the second epoch, and for each one after it."""
    images = open_images(f"tar:{pictures}")
    _KEPT.append(images)
    started = time.perf_counter()
    batches = training_batches(images, TRANSFORMS["published"](SIDE), 64, seed=0, first_step=len(images) * 3 // 2 // 64)
    next(batches)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(20):
        next(batches)
    return {"seconds": round(first, 2), "images/s": round(20 * 64 / (time.perf_counter() - started))}


_KEPT: list[Any] = []


def start(*arguments: Any) -> subprocess.Popen[bytes]:
    """Begins a command of Lexel's."""
    return subprocess.Popen([sys.executable, "-m", "lexel", *map(str, arguments)], stdout=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes], started: float) -> Command:
    """Waits for a command."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Command(round(time.perf_counter() - started, 1), round(used.ru_maxrss / 1024, 1), process.returncode)


def timed(*arguments: Any) -> Command:
    """Runs a command of Lexel's to its end.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    command = ended(start(*arguments), started)
    if command.status:
        raise RuntimeError(f"lexel {' '.join(map(str, arguments))} ended with {command.status}")
    return command


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a token set."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def written(folder: Path) -> int:
    """Whole shards in a folder of tokens."""
    return len(list(folder.glob("shard-*.json")))


def million(
    pictures: int, folder: Path, shard_size: int = SHARD_SIZE, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The whole way, by the commands that a user has; every figure.

    Raises:
        RuntimeError: a command failed, or the merged tokens are others than those of an undisturbed run.
    """
    os.environ["LEXEL_CACHE"] = str(folder / "cache")
    started = time.perf_counter()
    folder.mkdir(exist_ok=True)
    source = draw(folder / "pictures", pictures)
    say(f"{pictures:,} pictures drawn in {time.perf_counter() - started:.0f} s")
    found: dict[str, Any] = {"pictures": pictures, "bytes": sum(path.stat().st_size for path in source.iterdir())}
    for name, action in (("listed", listed), ("listed again", listed), ("shuffled", shuffled)):
        found[name] = measured(action, source)
        say(f"{name}: {found[name]}")
    run = tokenizer(folder / "run", source)

    def encode(*more: Any) -> tuple[Any, ...]:
        common = ("--batch-size", 256, "--shard-size", shard_size, "--device", "cpu")
        return ("encode", run, f"tar:{source}", *common, *more)

    whole, parts, merged = folder / "whole", [folder / "part-1", folder / "part-2"], folder / "merged"
    found["undisturbed"] = timed(*encode("--out", whole))._asdict()
    say(f"undisturbed: {found['undisturbed']}")

    started = time.perf_counter()
    processes = [start(*encode("--out", out, "--part", f"{number}/2")) for number, out in enumerate(parts, 1)]
    half = max(1, written(whole) // 4)  # of the half that a part has
    while written(parts[1]) < half and processes[1].poll() is None:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    found["killed"] = {**ended(processes[1], started)._asdict(), "shards": written(parts[1])}
    say(f"part 2 killed: {found['killed']}")
    found["part 1"] = ended(processes[0], started)._asdict()
    found["part 2 again"] = timed(*encode("--out", parts[1], "--part", "2/2"))._asdict()
    found["merged"] = timed("merge", *parts, "--out", merged)._asdict()
    say(f"part 1: {found['part 1']}; part 2 again: {found['part 2 again']}; merged: {found['merged']}")
    found["shards"], found["equal"] = written(merged), digests(merged) == digests(whole)
    if not found["equal"] or found["killed"]["status"] != -signal.SIGKILL:
        raise RuntimeError(f"the merged tokens are not those of an undisturbed run: {found}")
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=1_000_000, help="how many")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")


def run(arguments: argparse.Namespace) -> None:
    """Draws, lists, shuffles, encodes, kills, resumes, merges, compares; prints what each took."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        found = million(arguments.pictures, folder, say=lambda text: print(text, file=sys.stderr, flush=True))
    finally:
        shutil.rmtree(folder)
    part = {"commit": results.commit(), "machine": results.machine("cpu", 1), **found}
    lines = section(part)
    print("\n".join(lines))
    if arguments.write:
        results.write(results.PAGE, {**results.read(results.PAGE), "million": part}, "million", lines)


def section(part: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    listed, again, shuffled = part["listed"], part["listed again"], part["shuffled"]
    rows = [
        ("listed, the index of the shards made", listed["seconds"], f"{listed['peak MiB']} beyond the imports"),
        ("listed again, the index from the cache", again["seconds"], f"{again['peak MiB']}, {again['left MiB']} kept"),
        ("first batch in the middle of the second epoch", shuffled["seconds"], shuffled["peak MiB"]),
        ("encoded, undisturbed, one process", part["undisturbed"]["seconds"], part["undisturbed"]["peak"]),
        (
            f"part 2 of 2, killed after {part['killed']['shards']} shards",
            part["killed"]["seconds"],
            part["killed"]["peak"],
        ),
        ("part 1 of 2, beside it", part["part 1"]["seconds"], part["part 1"]["peak"]),
        ("part 2 again", part["part 2 again"]["seconds"], part["part 2 again"]["peak"]),
        ("merged, checksums compared", part["merged"]["seconds"], part["merged"]["peak"]),
    ]
    machine = f"commit {part['commit']}, {part['machine']}"
    equal = "equals that of the undisturbed run" if part["equal"] else "DIFFERS from that of the undisturbed run"
    return [
        f"`python -m benchmarks million --pictures {part['pictures']}`: {part['pictures']:,} PNG files of {SIDE} px "
        f"with classes in tar shards of {IN_A_SHARD:,} ({part['bytes'] / 2**30:.2f} GiB), one process a command, "
        f"{machine}. Every byte of the merged tokens ({part['shards']} shards) {equal}. Shuffled reading: "
        f"{shuffled['images/s']:,} images a second.",
        "",
        "| step | seconds | MiB at the peak |",
        "|---|---|---|",
        *(f"| {name} | {seconds:g} | {memory} |" for name, seconds, memory in rows),
    ]
