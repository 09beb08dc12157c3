"""Names of the image files below a folder: as fast as the walk itself, and what was left out."""

import bisect
import itertools
import operator
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lexel.data.files import EXTENSIONS
from lexel.errors import UsageError
from lexel.regular import kind

# All spellings, so that no name need be turned to lower case: 2^5 of the longest.
_ENDINGS = frozenset(
    "".join(letters)
    for extension in EXTENSIONS
    for letters in itertools.product(*((letter.lower(), letter.upper()) for letter in extension.removeprefix(".")))
)
# What most names end with, for a look at many names without a call of ours for each.
_SHORT_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS if len(ending) == 3)


class Names(Sequence[str]):
    """Many strings in one buffer of bytes: 8 bytes each beside their letters, where a list of str takes 57.

    Equal to a list of the same strings; `+` gives a list. Names of files that are no UTF-8 keep their bytes as Python
    does (`os.fsdecode`).
    """

    def __init__(self, names: Iterable[str], prefix: str = "") -> None:
        """The names, each behind the same prefix."""
        names = names if isinstance(names, list) else list(names)
        text = prefix + prefix.join(names) if names else ""
        self._bytes = text.encode("utf-8", "surrogatepass")
        lengths = np.fromiter(map(len, names), np.int64, len(names)) + len(prefix)
        if len(self._bytes) > len(text):  # characters of several bytes
            first = len(prefix.encode("utf-8", "surrogatepass"))
            lengths[:] = [first + len(name.encode("utf-8", "surrogatepass")) for name in names]
        self._ends = np.cumsum(lengths)

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """All names of several, one after the other, without a list of them."""
        other = cls([])
        other._bytes = b"".join([part._bytes for part in parts])
        lengths = [np.diff(part._ends, prepend=0) for part in parts]
        other._ends = np.cumsum(np.concatenate(lengths)) if parts else np.zeros(0, np.int64)
        return other

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def blank(self) -> bool:
        """Whether none of them has a letter."""
        return not self._bytes

    @property
    def distinct(self) -> bool:
        """Whether no two of them are equal."""
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        hashes.sort()
        return not (hashes[1:] == hashes[:-1]).any() or len(set(self)) == len(self)

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> "Names":
        """The names with these numbers, in this order."""
        chosen = np.asarray(numbers, np.int64)
        lengths = np.diff(self._ends, prepend=0)[chosen]
        lasts = self._ends[chosen]
        other = object.__new__(Names)
        starts = (lasts - lengths).tolist()
        other._bytes = b"".join([self._bytes[a:b] for a, b in zip(starts, lasts.tolist(), strict=True)])
        other._ends = np.cumsum(lengths)
        return other

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # an IndexError or a number of the set
        first = int(self._ends[number - 1]) if number else 0
        return self._bytes[first : int(self._ends[number])].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        first = 0
        for end in self._ends.tolist():
            yield self._bytes[first:end].decode("utf-8", "surrogatepass")
            first = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._bytes == other._bytes and np.array_equal(self._ends, other._ends)
        return isinstance(other, list | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[str]) -> list[str]:
        return [*self, *other]

    def __radd__(self, other: Sequence[str]) -> list[str]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 20 else f"<{len(self):,} names: {self[0]!r}, ...>"


def find_images(folder: str | Path, left_out: dict[str, str] | None = None) -> Names:
    """Paths of the image files below a folder, relative to it, with forward slashes, sorted.

    Hidden files and folders are left out; links to files and folders are followed, each folder once.

    Args:
        folder: where to look.
        left_out: filled with the subfolders that cannot be opened and with pipes, sockets and devices that are named
            like images, each with the reason.

    Raises:
        UsageError: the folder itself cannot be opened.
    """
    left_out = {} if left_out is None else left_out
    top = os.fspath(folder)
    try:
        status = Path(top).stat()
        with os.scandir(top):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be opened: {error.strerror}") from None
    return Names.joined(_walk(top, "", {(status.st_dev, status.st_ino)}, left_out))


def holds_images(folder: str | Path) -> bool:
    """Whether there is an image file anywhere below a folder; ends at the first one."""
    pending, seen = [os.fspath(folder)], set()
    while pending:
        path = pending.pop()
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if is_folder(entry):
                        pending.append(entry.path)
                    elif _is_named_like_an_image(entry.name):
                        return True
        except OSError:  # `find_images` names the folder
            continue
    return False


def _walk(path: str, prefix: str, seen: set[tuple[int, int]], left_out: dict[str, str]) -> list[Names]:
    """The names below one folder, sorted, in pieces; `prefix` is its path relative to the top, with a slash."""
    files, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):  # first, since most are: no second question, no call of ours
                    files.append(entry.name)
                    continue
                name = entry.name
                if name.startswith("."):
                    continue
                if is_folder(entry):
                    folders.append(entry)
                elif _is_named_like_an_image(name):
                    special = _special(entry)
                    if special is None:
                        files.append(name)
                    else:
                        left_out[prefix + name] = f"it is {special}, not a regular file"
    except OSError as error:
        left_out[prefix.rstrip("/")] = error.strerror or "it cannot be opened"
        return []
    below: dict[str, list[Names]] = {}
    # Real folders come before links to folders, so that a picture goes by its real path where it has one.
    for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):
        try:
            status = Path(entry.path).stat()  # an entry's own stat has no device on Windows
        except OSError as error:
            left_out[prefix + entry.name] = error.strerror or "it cannot be opened"
            continue
        if (status.st_dev, status.st_ino) not in seen:  # else a link that leads back to where we have been
            seen.add((status.st_dev, status.st_ino))
            below[f"{entry.name}/"] = _walk(entry.path, f"{prefix}{entry.name}/", seen, left_out)
    files.sort()
    del files[bisect.bisect_left(files, ".") : bisect.bisect_left(files, "/")]  # hidden ones
    if not _SHORT_ENDINGS.issuperset(map(operator.itemgetter(slice(-4, None)), files)):
        files = [name for name in files if _is_named_like_an_image(name)]
    pieces, first = [], 0
    for name in sorted(below):  # with its slash, a folder lies among the files where its content does
        last = bisect.bisect(files, name, first)
        pieces += [Names(files[first:last], prefix), *below[name]]
        first = last
    return [*pieces, Names(files[first:] if first else files, prefix)]


def _is_named_like_an_image(name: str) -> bool:
    stem, dot, ending = name.rpartition(".")
    return bool(stem and dot) and ending in _ENDINGS


def is_folder(entry: "os.DirEntry[Any]") -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _special(entry: "os.DirEntry[Any]") -> str | None:
    """The type of what is no file: "a named pipe", ...; None for files, and for broken links: unreadable pictures."""
    try:
        if entry.is_file():
            return None
        mode = Path(entry.path).stat().st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else kind(mode)
