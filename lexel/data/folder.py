"""Image sets in folders and single files: classes by subfolders, splits by their names."""

import bisect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from warnings import warn

import numpy as np

from lexel.data.files import EXTENSIONS
from lexel.data.images import FileImages, ImageSet
from lexel.data.listing import find_images, holds_images, is_folder
from lexel.data.names import Labels, Names
from lexel.data.options import OpenOptions
from lexel.errors import UsageError, some

# How a folder may call its parts; the first of each row is the name used here.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
SHOWN = 5  # names in a message, before the rest is only counted
SPLIT_NAMES = frozenset(name for names in SPLITS.values() for name in names)


class NoSplit(UsageError):
    """A source has no such split."""


class Layout(NamedTuple):
    """The kinds of a folder's subfolders."""

    splits: dict[str, str]  # split to the name of its subfolder; empty where subfolders are classes
    others: list[str]  # subfolders with pictures that are no splits


def layout(folder: Path) -> Layout:
    """Which splits a folder has: one rule for training, encoding and measuring.

    Subfolders named like splits are splits if no other subfolder holds pictures, or if there are at least two of them,
    train and another. Else they are classes that happen to be called so.

    Raises:
        UsageError: the folder cannot be opened.
    """
    try:
        with os.scandir(folder) as entries:
            subfolders = sorted(entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry))
    except OSError as error:
        raise UsageError(f"{folder} cannot be opened: {error.strerror}") from None
    return split_layout(subfolders, lambda name: holds_images(folder / name))


def split_layout(subfolders: Sequence[str], holds: Callable[[str], bool] = lambda name: True) -> Layout:
    """The rule of `layout` for subfolders by their names, of which some hold images."""
    splits: dict[str, str] = {}
    for split, names in SPLITS.items():
        for name in names:
            if name in subfolders:
                splits.setdefault(split, name)
    if not splits:
        return Layout({}, [])
    others = [name for name in subfolders if name not in splits.values() and holds(name)]
    if others and not ("train" in splits and len(splits) > 1):
        return Layout({}, others)
    return Layout(splits, others)


class Part(NamedTuple):
    """The contents of a split of a tree of images."""

    numbers: Sequence[int]  # of the names that were given
    names: Names  # below the split's folder, if one was asked for
    labels: Labels | None
    classes: list[str]


def part_of_names(source: str, names: Names, split: str | None) -> Part:
    """The images of a split, and their classes, by paths such as train/cat/1.jpg: the rule of folders for archives.

    Raises:
        NoSplit: there is no such split.
    """
    found = split_layout(sorted({name.partition("/")[0] for name in names if "/" in name}))
    numbers: Sequence[int] = range(len(names))
    if split is not None:
        if split not in found.splits:
            raise NoSplit(f"{source} has no split {split!r}: it has no folder called {' or '.join(SPLITS[split])}")
        inside: tuple[str, ...] = (f"{found.splits[split]}/",)
    else:
        inside = tuple(f"{name}/" for name in found.splits.values())
    if inside:
        numbers = [number for number, name in enumerate(names) if name.startswith(inside)]
        if found.others:
            warn(
                f"{source} has the splits {', '.join(found.splits.values())}; left out: {some(found.others, SHOWN)}",
                stacklevel=4,
            )
    chosen = names.take(numbers) if inside else names
    if split is not None:
        chosen = Names([name.partition("/")[2] for name in chosen])
    labels, classes = classes_of_names(source, chosen, 1 if inside and split is None else 0)
    return Part(numbers, chosen, labels, classes)


def open_folder(folder: Path, options: OpenOptions) -> ImageSet:
    """The pictures of a folder, in any nesting.

    Where all of them lie in subfolders, the first level names their classes, numbered in sorted order; below a split
    the level after it does. What is left out, and why no classes are used, is said in a warning.

    Raises:
        NoSplit: there is no such split.
        UsageError: there is no picture.
    """
    found, split = layout(folder), options.split
    top, below_splits = folder, split is None and bool(found.splits)
    if split is not None:
        if split not in found.splits:
            raise NoSplit(f"{folder} has no split {split!r}: {_why_no_split(folder, split, found)}")
        folder = folder / found.splits[split]
    left_out: dict[str, str] = {}
    names = find_images(folder, left_out)
    beside = list(found.others) if found.splits else []
    if below_splits:
        inside = tuple(f"{name}/" for name in found.splits.values())
        beside += [name for name in names if "/" not in name]
        names = Names([name for name in names if name.startswith(inside)])
    if beside:
        warn(f"{top} has the splits {', '.join(found.splits.values())}; left out: {some(beside, SHOWN)}", stacklevel=4)
    if left_out:
        reasons = some([f"{name} ({why})" for name, why in left_out.items()], SHOWN)
        warn(f"left out {len(left_out):,} entries of {folder}: {reasons}", stacklevel=4)
    if not names:
        raise UsageError(f"there are no images in {folder} (looked for {', '.join(sorted(EXTENSIONS))})")
    labels, classes = classes_of_names(folder, names, 1 if below_splits else 0, ordered=True)
    images = FileImages(folder, names, labels, classes, decoding=options.decoding)
    images.left_out = left_out
    return images


def _why_no_split(folder: Path, split: str, found: Layout) -> str:
    name = next((name for name in SPLITS[split] if (folder / name).is_dir()), None)
    if name is None:
        return f"it has no subfolder called {' or '.join(SPLITS[split])}"
    return f"{name} is a class beside {some(found.others, SHOWN)}; give {folder / name} for that folder alone"


def classes_of_names(
    folder: str | Path, names: Sequence[str], level: int, ordered: bool = False
) -> tuple[Labels | None, list[str]]:
    """Labels and classes by the folder at this level of each name; no labels if a picture lies above that level.

    Names that are sorted (`ordered`) are not all looked at: those of a folder are neighbours.
    """

    def parent(name: str) -> str:
        return name.split("/", level + 1)[level] if name.count("/") > level else ""

    runs: list[tuple[str, int]] = []  # a parent, and how many neighbours have it
    if ordered:
        first = 0
        while first < len(names):
            name, last = names[first], first + 1
            if parent(name):  # behind a folder's names come those with a greater character than its slash
                inside = "/".join(name.split("/", level + 1)[: level + 1])
                last = bisect.bisect_left(names, f"{inside}{chr(ord('/') + 1)}", last)
            runs.append((parent(name), last - first))
            first = last
    else:
        runs = [(parent(name), 1) for name in names]
    classes = sorted({name for name, _ in runs} - {""})
    if not all(name for name, _ in runs):
        strays = [name for name in names if not parent(name)]
        if classes:
            warn(
                f"no classes are used: {len(strays):,} of {len(names):,} images of {folder} lie beside the folders "
                f"{some(classes, SHOWN)}, not in them: {some(strays, SHOWN)}",
                stacklevel=5,
            )
        return None, []
    called = [name for name in classes if name in SPLIT_NAMES]
    if level == 0 and called:
        others = some([name for name in classes if name not in SPLIT_NAMES], SHOWN)
        warn(
            f"{some(called, SHOWN)} is a class of {folder}, not a split, since it lies beside {others}; give "
            f"{folder}/{called[0]} for that folder alone",
            stacklevel=5,
        )
    numbers = {name: number for number, name in enumerate(classes)}
    of_runs, counts = ([numbers[name] for name, _ in runs], [count for _, count in runs])
    return Labels(np.repeat(np.array(of_runs, np.int64), counts)), classes
