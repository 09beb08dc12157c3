"""Which images are held out for validation, and numbers of classes, the same on both sides."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lexel.errors import UsageError, some


def hold_out_order(names: Sequence[str], fraction: float) -> tuple[NDArray[np.int64], int]:
    """Numbers of named things in the order of the hashes of the names, and how many of the first to hold out."""
    if not 0 < fraction < 1:
        raise UsageError(f"the part to hold out must lie between 0 and 1, got {fraction}")
    if len(names) < 2:
        raise UsageError(f"holding out a part needs at least 2 images, and there is {len(names)}")
    digests = (_digest(name)[:8] for name in names)
    first = np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64, len(names))
    order = np.argsort(first, kind="stable")
    ordered = first[order]
    if (ordered[1:] == ordered[:-1]).any():  # one in 10^5 sets of 10^7 names
        order = np.array(sorted(range(len(names)), key=lambda number: _digest(names[number])), np.int64)
    return order, min(max(1, round(fraction * len(names))), len(names) - 1)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def class_numbers(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels and classes of images whose classes have these names, numbered in sorted order."""
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[name] for name in names], classes


def renumbered(labels: Sequence[int], own: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Labels that number the classes `own`, as labels that number `classes`: the same names.

    Raises:
        UsageError: a label's class is not among `classes`; its name is said.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({own[label] for label in set(labels)} - numbers.keys())
    if unknown:
        raise UsageError(f"unknown class {some([*map(repr, unknown)])}; the classes are {some(classes, 10)}")
    table = [numbers.get(name, -1) for name in own]
    return [table[label] for label in labels]
