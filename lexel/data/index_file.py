"""Indexes of large sets in memory-mapped Arrow files of the cache: names, labels, captions and places of images.

What is mapped belongs to the system's page cache: processes of a machine share it, and it can be dropped and read
again. A file is an Arrow stream of one batch, which anything that reads Arrow reads, followed by the SHA-256 of it.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from lexel.checkpoint import atomic
from lexel.data.files import in_words
from lexel.data.names import Names
from lexel.errors import UsageError
from lexel.regular import open_regular
from lexel.runtime import cache_folder, is_cached

LARGE = 200_000  # images from which on an index is mapped; a smaller one takes little
HINT = 2**28  # bytes of an index from which on it is said that pyarrow would keep them out of every process
FORMAT = 1  # of the file: another one is written anew
FACTS = b"lexel"  # the key of the plain data in a file's metadata
DIGEST = hashlib.sha256().digest_size
AT_ONCE = 2**22  # bytes read together

Column = Names | NDArray[np.integer[Any]]  # texts; whole numbers (N,), or (N, k)
Columns = Mapping[str, Column]


class Index(NamedTuple):
    """What a file holds: columns of one length, and plain data beside them."""

    columns: dict[str, Column]
    facts: dict[str, Any]


class MappedArray(np.ndarray[Any, Any]):
    """An array in a mapped file. To another process it goes as its place there, not as a copy."""

    place: tuple[str, str, str] | None = None  # the file, the column, and the part of a column

    def __array_finalize__(self, obj: Any) -> None:
        self.place = None  # what is cut out of an array lies elsewhere

    def __reduce__(self) -> Any:
        if self.place is not None and is_cached(Path(self.place[0])):
            return _reopened, self.place
        return np.array(self).__reduce__()


def is_large(images: Sized) -> bool:
    """Whether the index of so many images is mapped."""
    return len(images) >= LARGE


def map_index(images: Any, source: Any, content: Any = None) -> None:
    """Keeps the index of a large set of images in a mapped file of the cache.

    Args:
        images: an ImageSet.
        source: plain data that names where it comes from; None maps nothing.
        content: plain data that changes whenever the index does; the hash of the index by default.
    """
    if is_large(images) and images.window is None and source is not None:
        columns = images.index()
        path = index_path(source, content or content_of(columns))
        images.hold_index(keep(columns, path, {"classes": images.classes}))
        images.source = source


def source_of(kind: str, location: str, split: str | None) -> list[Any]:
    """Names where a set of images comes from, whatever is there at the moment."""
    anywhere = Path(location).expanduser().is_absolute() or "://" in location
    return [kind, "" if anywhere else str(Path.cwd()), location, split]


def keep(columns: Columns, path: Path, facts: Mapping[str, Any]) -> dict[str, Column]:
    """The columns in a mapped file at `path`, which is written where it is missing or damaged.

    Without pyarrow, or where the cache cannot be written, they stay as they are: in memory.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        held = sum(_bytes(column) for column in columns.values())
        if held >= HINT:
            warn(
                f"the index takes {held / 2**20:,.0f} MiB in every process; with pyarrow (pip install "
                "'lexel[tokens]') processes share it",
                stacklevel=2,
            )
        return dict(columns)
    found = find(path)
    if found is not None:
        return found.columns
    try:
        write(path, columns, facts)
        return read(path).columns
    except (OSError, UsageError) as error:  # a cache that cannot be written costs memory, and nothing else
        warn(f"the index of {len(next(iter(columns.values()))):,} images cannot be kept: {error}", stacklevel=2)
        return dict(columns)


def find(path: Path) -> Index | None:
    """What is in a file of the cache; None where it is missing or damaged, or pyarrow is missing."""
    if not is_cached(path):
        return None
    try:
        return read(path)
    except (UsageError, ImportError):
        return None


def index_path(source: Any, content: Any) -> Path:
    """The file of the cache for the index of a source, given what decides its content.

    Args:
        source: plain data that names it: kind, location, split.
        content: plain data that changes whenever the index does.
    """
    parts = (hashlib.sha256(json.dumps(part, default=str).encode()).hexdigest() for part in (source, [FORMAT, content]))
    return cache_folder() / "indexes" / f"{next(parts)[:32]}-{next(parts)[:32]}.arrow"


def content_of(columns: Columns) -> str:
    """The SHA-256 of columns."""
    hasher = hashlib.sha256()
    for name, column in columns.items():
        arrays = (column.letters, column.ends) if isinstance(column, Names) else (column,)
        for array in arrays:
            hasher.update(f"{name} {array.dtype} {array.shape}\n".encode())
            hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def write(path: Path, columns: Columns, facts: Mapping[str, Any]) -> None:
    """Writes columns of one length and plain data; files of other contents of the same source are removed.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa

    arrays = {name: _as_arrow(pa, column) for name, column in columns.items()}
    with atomic(path) as partial:
        with partial.open("wb") as file:
            batch = pa.RecordBatch.from_pydict(arrays, metadata={FACTS: json.dumps(facts)})
            with pa.ipc.new_stream(pa.PythonFile(file), batch.schema) as stream:
                stream.write_batch(batch)
        with partial.open("r+b") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(digest)
    for other in path.parent.glob(f"{path.name.partition('-')[0]}-*.arrow"):
        if other != path:
            with suppress(OSError):  # a process that has mapped it keeps it; left there, it takes room alone
                other.unlink()


def read(path: Path, verify: bool = True) -> Index:
    """Maps what `write` wrote.

    Args:
        path: the file.
        verify: whether its bytes are compared with their checksum, without leaving them in this process.

    Raises:
        UsageError: it is damaged.
        ImportError: pyarrow is missing.
    """
    import pyarrow as pa

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size - DIGEST
            if verify:
                hasher, left = hashlib.sha256(), max(size, 0)
                while left and (part := file.read(min(left, AT_ONCE))):
                    hasher.update(part)
                    left -= len(part)
                if size <= 0 or file.read() != hasher.digest():
                    raise UsageError(f"{path} is damaged")
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pa.ipc.open_stream(pa.py_buffer(whole)) as stream:
            batch = stream.read_next_batch()
        facts = json.loads(batch.schema.metadata[FACTS])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{path} is damaged ({in_words(error)[:200]})") from None
    columns = {name: _from_arrow(str(path), name, batch.column(name)) for name in batch.schema.names}
    return Index(columns, facts)


def _as_arrow(pa: Any, column: Column) -> Any:
    if isinstance(column, Names):
        ends = np.concatenate([np.zeros(1, np.int64), column.ends])
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(column.letters))]
        return pa.Array.from_buffers(pa.large_binary(), len(column), buffers)
    values = pa.array(np.ascontiguousarray(column).reshape(-1))
    return values if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, column.shape[1])


def _from_arrow(path: str, name: str, column: Any) -> Column:
    import pyarrow as pa

    if pa.types.is_large_binary(column.type):
        _, ends, letters = column.buffers()
        first = _mapped(ends, np.int64, (path, name, "ends"), len(column) + 1)
        return Names.over(
            _mapped(letters, np.uint8, (path, name, "letters"), int(first[-1])),
            _mapped(ends, np.int64, (path, name, "ends"), len(column) + 1, 1),
        )
    width, values = 1, column
    if pa.types.is_fixed_size_list(column.type):
        width, values = column.type.list_size, column.values
    kind = values.type.to_pandas_dtype()
    flat = _mapped(values.buffers()[1], kind, (path, name, ""), width * len(column))
    array = flat if width == 1 else flat.reshape(-1, width).view(MappedArray)
    array.place = flat.place
    return array


def _mapped(buffer: Any, kind: Any, place: tuple[str, str, str], count: int, skipped: int = 0) -> MappedArray:
    values = np.frombuffer(buffer, kind, count)[skipped:] if count else np.empty(0, kind)
    array = values.view(MappedArray)
    array.place = place
    return array


def _reopened(path: str, name: str, part: str) -> Any:
    """The array that another process had mapped; it has compared the checksum."""
    column = read(Path(path), verify=False).columns[name]
    return column if isinstance(column, np.ndarray) else column.ends if part == "ends" else column.letters


def _bytes(column: Column) -> int:
    return column.letters.nbytes + column.ends.nbytes if isinstance(column, Names) else column.nbytes
