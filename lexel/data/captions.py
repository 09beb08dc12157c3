"""Features of captions: what a text encoder made of one caption an image, from files or as an encoder gives them."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from lexel.arrays import open_arrays
from lexel.data.images import digest
from lexel.errors import UsageError
from lexel.regular import expanded
from lexel.spacing import evenly_spaced

FEATURES = "features"  # the array's name in an .npz file
SAMPLED = 256  # captions whose features name a file


class Captions(Protocol):
    """Features of numbered captions, each padded with rows of zeros to one length."""

    length: int  # rows
    channels: int  # of the text encoder

    def __len__(self) -> int:
        """The number of captions."""

    def fingerprint(self) -> str:
        """Names these features, so that a stopped writer goes on with no others."""

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """The features of some captions: float32 (n, length, channels)."""


class CaptionFile:
    """Features of captions in a file of arrays.

    A .npy file holds floats (N, length, channels). A .npz file holds them as `features`, or as (rows of all captions,
    channels) with integer `lengths` (N,), one caption after the other; `lengths` beside (N, length, channels) say
    which rows are padding. `names` (N,) of the images, if given, say which caption belongs to which.

    Args:
        path: the file; mapped where it is not compressed.

    Raises:
        UsageError: the file is missing or damaged, or its arrays do not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        with open_arrays(self.path) as arrays:
            only = len(arrays.names) == 1
            name = FEATURES if FEATURES in arrays or not only else arrays.names[0]
            header = arrays.header(name, "...", np.floating)
            if len(header.shape) == 2 and "lengths" in arrays:
                self._array = arrays.map(name, "R C", np.floating)
            else:
                self._array = arrays.map(name, "N L C", np.floating)
            lengths = arrays.read("lengths", "N", np.integer) if "lengths" in arrays else None
            names = arrays.read("names", "N", np.str_).tolist() if "names" in arrays else None
        self.channels = int(self._array.shape[-1])
        count = len(self._array) if lengths is None else len(lengths)
        self._numbers: Sequence[int] = range(count)
        self._lengths: list[int] | None = None if lengths is None else lengths.tolist()
        self._ends = None if lengths is None else np.cumsum(lengths, dtype=np.int64)
        self.length = int(self._array.shape[1] if self._array.ndim == 3 else max([0, *(self._lengths or ())]))
        self._check(names)
        self._names = names

    def _check(self, names: list[str] | None) -> None:
        """Refuses arrays that do not fit together."""
        lengths, count = self._lengths or [], len(self)
        low, high = min(lengths, default=0), max(lengths, default=0)
        if self._array.ndim == 3 and (count != len(self._array) or low < 0 or high > self._array.shape[1]):
            raise UsageError(f"{self.path}: lengths ({count} from {low} to {high}) do not fit {self._array.shape}")
        if self._array.ndim == 2 and (low < 0 or sum(lengths) != len(self._array)):
            raise UsageError(f"{self.path}: lengths add up to {sum(lengths)}, not {len(self._array)}")
        if self.length < 1 or self.channels < 1:
            raise UsageError(f"{self.path} holds no features: {self._array.shape}")
        if names is not None and (len(names) != count or len(set(names)) != count):
            raise UsageError(f"{self.path} has {len(set(names))} different names for {count} captions")

    def of_images(self, names: Sequence[str]) -> Self:
        """The captions of images in their order: by name if the file has names, else as many as there are images.

        Raises:
            UsageError: an image has no caption, or there are more or fewer captions than images.
        """
        if self._names is None:
            if len(names) != len(self):
                raise UsageError(
                    f"{self.path} has {len(self)} captions for {len(names)} images; give one for each, in the order of "
                    "their names, or an .npz file with names"
                )
            return self
        places = {name: number for number, name in enumerate(self._names)}
        missing = [name for name in names if name not in places]
        if missing:
            raise UsageError(f"{self.path} has no caption of {len(missing)} images, such as {missing[0]!r}")
        part = copy.copy(self)
        part._numbers, part._names = [places[name] for name in names], list(names)
        return part

    def __len__(self) -> int:
        return len(self._numbers)

    def fingerprint(self) -> str:
        """A SHA-256 of shape and lengths, and of the features of up to SAMPLED captions."""
        hasher = hashlib.sha256(digest([len(self), self.length, self.channels, self._lengths or []]).encode())
        for number in evenly_spaced(len(self), SAMPLED):
            hasher.update(self.rows([number]).data)
        return hasher.hexdigest()

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """The features of some captions: float32 (n, length, channels), rows of zeros where they are padded.

        Raises:
            UsageError: a feature is not finite.
        """
        found = np.zeros((len(numbers), self.length, self.channels), np.float32)
        for row, place in enumerate(self._numbers[number] for number in numbers):
            count = self.length if self._lengths is None else self._lengths[place]
            if self._array.ndim == 3:
                found[row, :count] = self._array[place, :count]
            elif self._ends is not None:
                found[row, :count] = self._array[self._ends[place] - count : self._ends[place]]
            if not np.isfinite(found[row]).all():
                raise UsageError(f"{self.path}: the features of caption {place} are not finite")
        return found


def stored(captions: Captions, numbers: Sequence[int]) -> np.ndarray:
    """Features as they are stored: float16 (n, length, channels).

    Raises:
        UsageError: a feature does not fit into float16.
    """
    rows = captions.rows(numbers)
    largest = float(np.abs(rows).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise UsageError(f"features of captions go up to {largest:.4g}, beyond float16; scale them down")
    return rows.astype(np.float16)
