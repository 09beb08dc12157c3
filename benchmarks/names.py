"""A million and ten million names: put together as a walk gives them, ordered, checked, shared out: time, memory."""

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.memory import resident
from lexel.data.names import Names
from lexel.data.order import permutation

IN_A_FOLDER = 10_000


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", type=int, nargs="+", default=[1_000_000, 10_000_000])


def timed(do: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of one core, and the result."""
    begun = time.process_time()
    result = do(*arguments)
    return time.process_time() - begun, result


def listed(count: int) -> Names:
    """So many names of 18 letters, folder by folder."""
    folders = range(count // IN_A_FOLDER)
    numbers = [range(folder * IN_A_FOLDER, (folder + 1) * IN_A_FOLDER) for folder in folders]
    return Names.joined([Names([f"{folder:05d}/{one:08d}.jpg" for one in numbers[folder]]) for folder in folders])


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of them."""
    print(f"{results.machine('cpu', 1)}, seconds of one core\n")
    print("| names | put together | MiB held | the order of an epoch | no name twice | half of them taken |")
    print("|---|---|---|---|---|---|")
    for count in arguments.names:
        before = resident("VmRSS")
        building, names = timed(listed, count)
        held = (resident("VmRSS") - before) / 1024
        ordering, order = timed(permutation, count, 0, 3)
        checking, _ = timed(getattr, names, "distinct")
        taking, _ = timed(names.take, order[: len(order) // 2])
        print(f"| {count:,} | {building:.2f} s | {held:.0f} | {ordering:.2f} s | {checking:.2f} s | {taking:.2f} s |")
        del names, order
