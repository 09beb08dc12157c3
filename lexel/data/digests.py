"""Fingerprints of plain data, however much of it: what names a set of images and the versions of its files."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

AT_ONCE = 65_536  # rows that are written out together


def digest(value: Any) -> str:
    """The SHA-256 of plain data; iterators in a list stand for lists that need not be in memory whole."""
    hasher = hashlib.sha256()
    if not (isinstance(value, list) and any(isinstance(part, Iterator) for part in value)):
        hasher.update(_as_json(value))
        return hasher.hexdigest()
    for number, part in enumerate(value):
        hasher.update(b", " if number else b"[")
        if not isinstance(part, Iterator):
            hasher.update(_as_json(part))
            continue
        hasher.update(b"[")
        for run in itertools.count():
            some = list(itertools.islice(part, AT_ONCE))
            if not some:
                break
            hasher.update((b", " if run else b"") + _as_json(some)[1:-1])
        hasher.update(b"]")
    hasher.update(b"]")
    return hasher.hexdigest()


def rows(array: NDArray[Any]) -> Iterator[Any]:
    """The rows of an array as plain data, a few of them at a time."""
    for begin in range(0, len(array), AT_ONCE):
        yield from array[begin : begin + AT_ONCE].tolist()


def _as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def size_and_date(path: str | Path) -> tuple[int, int] | None:
    """Size and date of a file; None for a link that leads nowhere."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
