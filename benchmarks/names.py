"""A million and ten million names: put together, ordered, checked, shared out, and held by workers: time, memory.

The second table is of whole sets as tar shards give them (names, labels, places), without any shard: in memory, and
mapped from the cache. Files are not listed.
"""

import argparse
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.memory import resident
from lexel.data import index_file
from lexel.data.files import Decoding
from lexel.data.names import Names
from lexel.data.order import Positions, permutation
from lexel.data.tar import TarImages

IN_A_FOLDER = 10_000
WORKERS = 4
LOOKED_UP = 50_000  # images whose name, label and place a worker asks for, in the order of an epoch
MEANS = ("in memory", "mapped")
SOURCE = ["benchmark"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", type=int, nargs="+", default=[1_000_000, 10_000_000])


def timed(do: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of one core, and the result."""
    begun = time.process_time()
    result = do(*arguments)
    return time.process_time() - begun, result


def listed(count: int) -> Names:
    """So many names of 18 letters, folder by folder."""
    folders = range(-(-count // IN_A_FOLDER))
    numbers = [range(folder * IN_A_FOLDER, min(count, (folder + 1) * IN_A_FOLDER)) for folder in folders]
    return Names.joined([Names([f"{folder:05d}/{one:08d}.jpg" for one in numbers[folder]]) for folder in folders])


class Shardless(TarImages):
    """Images of shards that are not there."""

    def _is_readable(self, number: int) -> bool:
        return True


def a_set(count: int) -> Shardless:
    """So many images of a thousand classes in shards of 10,000, none of which is there."""
    numbers = np.arange(count)
    places = np.stack([numbers // IN_A_FOLDER, numbers % IN_A_FOLDER * 2048 + 512, np.full(count, 1500)], 1)
    shards = [Path(f"{shard:05d}.tar") for shard in range(-(-count // IN_A_FOLDER))]
    classes = [str(number) for number in range(1000)]
    labels = (numbers % 1000).tolist()
    return Shardless(Decoding(), shards, [None] * len(shards), places, listed(count), labels, classes)


def unshared() -> float:
    """MiB of this process that no file backs and no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Private_Dirty")).split()[1]) / 1024


def begin(images: Shardless, all_there: Any) -> None:
    """Gives a worker the set, and what its workers meet at."""
    look.images, look.all_there = images, all_there  # type: ignore[attr-defined]


def look(worker: int) -> float:
    """MiB that a worker has for itself after it asked for names, labels and places in the order of an epoch."""
    images: Shardless = look.images  # type: ignore[attr-defined]
    look.all_there.wait(300)  # type: ignore[attr-defined]
    assert images.labels is not None
    for number in np.random.default_rng(worker).integers(0, len(images), LOOKED_UP).tolist():
        assert images.names[number]
        assert images.labels[number] < len(images.classes)
        assert images.places[number].tolist()[2] == 1500
    return unshared()


def of_workers(images: Shardless, kind: str) -> float:
    """The mean of what each of WORKERS processes at the same time has for itself, in MiB."""
    context: Any = multiprocessing.get_context(kind)
    with ProcessPoolExecutor(WORKERS, context, begin, (images, context.Barrier(WORKERS))) as pool:
        return sum(pool.map(look, range(WORKERS))) / WORKERS


def kept(count: int) -> dict[str, float]:
    """Writes the index of a set of so many images; the seconds of a first opening."""
    index_file.LARGE = 0
    making, images = timed(a_set, count)
    keeping, _ = timed(index_file.map_index, images, SOURCE, count)
    return {"first": making + keeping}


def opened(count: int, means: str) -> Shardless:
    """A set of so many images, put together, or found in the cache as `kept` left it."""
    if means == MEANS[0]:
        return a_set(count)
    images = a_set(1)
    found = index_file.find(index_file.index_path(SOURCE, count))
    assert found is not None
    images.hold_index(found.columns)
    images.source, images.classes = SOURCE, found.facts["classes"]
    return images


def held(count: int, means: str) -> dict[str, float]:
    """The numbers of a set of so many images, in a process of its own."""
    index_file.LARGE = 0 if means == "mapped" else 10**12
    opened(1, MEANS[0])  # libraries load their parts on first use
    before = unshared()
    row: dict[str, float] = {}
    row["open"], images = timed(opened, count, means)
    row["own"] = unshared() - before
    row["sent"] = len(pickle.dumps(images)) / 2**20
    for kind in ("fork", "spawn"):
        row[kind] = of_workers(images, kind)
    row["ordered"], _ = timed(lambda: Positions(count, 3)[count + count // 2])
    row["fingerprint"], _ = timed(images.fingerprint)
    before = unshared()
    row["held out"], parts = timed(images.hold_out, 0.05)
    row["parts"] = unshared() - before
    assert [len(part) for part in parts] == [count - count // 20, count // 20]
    return row


def in_a_process(do: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(do, *arguments).result()


def table_of_names(counts: list[int]) -> None:
    """Prints what is done with names alone."""
    print("| names | put together | MiB held | the order of an epoch | no name twice | half of them taken |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        before = resident("VmRSS")
        building, names = timed(listed, count)
        held = (resident("VmRSS") - before) / 1024
        ordering, order = timed(permutation, count, 0, 3)
        checking, _ = timed(getattr, names, "distinct")
        taking, _ = timed(names.take, order[: len(order) // 2])
        print(f"| {count:,} | {building:.2f} s | {held:.0f} | {ordering:.2f} s | {checking:.2f} s | {taking:.2f} s |")
        del names, order


def table_of_sets(counts: list[int]) -> None:
    """Prints what a set costs in memory and mapped, to the process that opens it and to its workers."""
    least = in_a_process(held, 1000, MEANS[0])  # what processes take without any set to speak of
    print(
        "| images | index | opened | fingerprint | 5 % held out | resumed | MiB of its own | the parts' "
        f"| each of {WORKERS} forked workers | spawned | MiB sent to each |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for count in counts:
        first = in_a_process(kept, count)["first"]
        for means in MEANS:
            row = in_a_process(held, count, means)
            seconds = [f"{row[name]:.2f} s" for name in ("open", "fingerprint", "held out", "ordered")]
            memory = [f"{max(0, row[name] - least[name]):.0f}" for name in ("own", "parts", "fork", "spawn", "sent")]
            print(f"| {count:,} | {means} | {' | '.join([*seconds, *memory])} |", flush=True)
        print(f"| {count:,} | put together and written | {first:.2f} s | | | | | | | | |", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Prints two tables of them."""
    print(f"{results.machine('cpu', 1)}, seconds of one core\n")
    table_of_names(arguments.names)
    print()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LEXEL_CACHE"] = folder
        table_of_sets(arguments.names)
