"""Many names and class numbers in few buffers, in memory or in a mapped file."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 65_536  # taken out of a buffer together


class Names(Sequence[str]):
    """Many strings in one buffer of bytes: 8 bytes each beside their letters, where a list of str takes 57.

    Equal to a list of the same strings; `+` gives a list. Names of files that are no UTF-8 keep their bytes as Python
    does (`os.fsdecode`). The buffers may lie in a mapped file (`over`).
    """

    def __init__(self, names: Iterable[str], prefix: str = "") -> None:
        """The names, each behind the same prefix."""
        names = names if isinstance(names, list) else list(names)
        text = prefix + prefix.join(names) if names else ""
        self._bytes: bytes | memoryview = text.encode("utf-8", "surrogatepass")
        lengths = np.fromiter(map(len, names), np.int64, len(names)) + len(prefix)
        if len(self._bytes) > len(text):  # characters of several bytes
            first = len(prefix.encode("utf-8", "surrogatepass"))
            lengths[:] = [first + len(name.encode("utf-8", "surrogatepass")) for name in names]
        self._ends: NDArray[np.int64] = np.cumsum(lengths)
        self._array: NDArray[np.uint8] | None = None  # whose memory the bytes are

    @classmethod
    def between(cls, mark: str, text: str, prefix: str = "") -> "Names":
        """The names that a character follows in a text, each behind the same prefix: "a/b/" holds two.

        Several times as fast as a list of names, whose lengths have to be asked for one by one.
        """
        letters, put = (part.encode("utf-8", "surrogatepass") for part in (text, prefix))
        ends = np.flatnonzero(np.frombuffer(letters, np.uint8) == ord(mark))
        count, other = len(ends), cls([])
        other._bytes = (put + letters.replace(mark.encode(), put))[: len(letters) - count + count * len(put)]
        other._ends = ends + np.arange(count) * (len(put) - 1) + len(put)
        return other

    @classmethod
    def over(cls, letters: NDArray[np.uint8], ends: NDArray[np.int64]) -> "Names":
        """The names whose UTF-8 lies in an array, one after the other, up to the end of each; nothing is copied."""
        other = cls([])
        other._array, other._bytes, other._ends = letters, memoryview(letters.data), ends
        return other

    @property
    def letters(self) -> NDArray[np.uint8]:
        """The UTF-8 of all names: uint8 (bytes,)."""
        return np.frombuffer(self._bytes, np.uint8) if self._array is None else self._array

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each name ends in `letters`: int64 (N,)."""
        return self._ends

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """All names of several, one after the other, without a list of them."""
        other = cls([])
        other._bytes = b"".join([part._bytes for part in parts])
        lengths = [np.diff(part._ends, prepend=0) for part in parts]
        other._ends = np.cumsum(np.concatenate(lengths)) if parts else np.zeros(0, np.int64)
        return other

    def __getstate__(self) -> tuple[Any, ...]:
        return (self._bytes if self._array is None else None, self._array, self._ends)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        letters, self._array, self._ends = state
        self._bytes = letters if self._array is None else memoryview(self._array.data)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def distinct(self) -> bool:
        """Whether no two of them are equal."""
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        hashes.sort()
        return not (hashes[1:] == hashes[:-1]).any() or len(set(self)) == len(self)

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> "Names":
        """The names with these numbers, in this order."""
        chosen = np.asarray(numbers, np.int64)
        lasts = self._ends[chosen]
        firsts = np.where(chosen % max(1, len(self)) > 0, self._ends[chosen - 1], 0)
        other = Names([])
        pairs = zip(firsts.tolist(), lasts.tolist(), strict=True)
        other._bytes = b"".join([self._bytes[first:last] for first, last in pairs])
        other._ends = np.cumsum(lasts - firsts)
        return other

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self._name(one) for one in range(*number.indices(len(self)))]
        return self._name(range(len(self))[number])  # an IndexError or a number of the set

    def _name(self, number: int) -> str:
        first = int(self._ends[number - 1]) if number else 0
        return str(self._bytes[first : int(self._ends[number])], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        first = 0
        for begin in range(0, len(self), AT_ONCE):
            for end in self._ends[begin : begin + AT_ONCE].tolist():
                yield str(self._bytes[first:end], "utf-8", "surrogatepass")
                first = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ChosenNames):
            return other == self
        if isinstance(other, Names):
            return np.array_equal(self._ends, other._ends) and self._bytes == other._bytes
        return isinstance(other, list | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[str]) -> list[str]:
        return [*self, *other]

    def __radd__(self, other: Sequence[str]) -> list[str]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 20 else f"<{len(self):,} names: {self[0]!r}, ...>"


class ChosenNames(Names):
    """Some of many names, by their numbers: 8 bytes each, and none where the numbers are mapped."""

    def __init__(self, names: Names, numbers: NDArray[np.int64]) -> None:
        self._names, self._numbers = names, numbers

    @property
    def letters(self) -> NDArray[np.uint8]:
        return self._names.take(self._numbers).letters

    @property
    def ends(self) -> NDArray[np.int64]:
        return self._names.take(self._numbers).ends

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> Names:
        return self._names.take(self._numbers[np.asarray(numbers, np.int64)])

    def __getstate__(self) -> tuple[Any, ...]:
        return self._names, self._numbers

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._names, self._numbers = state

    def __len__(self) -> int:
        return len(self._numbers)

    def _name(self, number: int) -> str:
        return self._names[int(self._numbers[number])]

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), AT_ONCE):
            yield from self._names.take(self._numbers[begin : begin + AT_ONCE])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | tuple | Names) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None


def numbered(count: int) -> list[str]:
    """Names of things that have none, "000", "001", ...: their numbers, as long as that of the last one."""
    digits = len(str(max(count - 1, 0)))
    return [f"{number:0{digits}d}" for number in range(count)]


class Labels(Sequence[int]):
    """Many class numbers in one array, which may lie in a mapped file; equal to a list of the same numbers."""

    def __init__(self, array: NDArray[np.integer[Any]]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, number: int) -> int: ...
    @overload
    def __getitem__(self, number: slice) -> list[int]: ...
    def __getitem__(self, number: int | slice) -> int | list[int]:
        found: int | list[int] = self.array[number].tolist()
        return found

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, len(self), AT_ONCE):
            yield from self.array[begin : begin + AT_ONCE].tolist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Labels):
            return np.array_equal(self.array, other.array)
        return isinstance(other, list | tuple) and self.array.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 20 else f"<{len(self):,} class numbers: {self[0]}, ...>"
