"""Reading and writing .npy and .npz files: the header is checked before memory is taken, and no code in them is run.

Every array that Lexel reads from a file (statistics, samples, pictures, tokens, banks of vectors) comes through here.
The shape and type that a reader needs are checked against the header, the header against the bytes that are really
there, and whatever is wrong with a file is one UsageError.

    with open_arrays("statistics.npz") as arrays:
        mean = arrays.read("mu", "D", np.floating)
        covariance = arrays.read("sigma", f"{len(mean)} {len(mean)}", np.floating)

    tokens = read_array("tokens.npy", "N ...", np.integer)
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from lexel.checkpoint import DAMAGE, atomic
from lexel.errors import UsageError
from lexel.regular import expanded

ONLY = "arr_0"  # the name of the array in a .npy file, as numpy.savez names an array without one

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000  # bytes, NumPy's own limit
# The header as NumPy and others write it: a Python dictionary of three keys. No objects (they are pickles), no records.
_FIELDS = {
    "descr": re.compile(r"""['"]descr['"]\s*:\s*['"]([<>|=]?(?:b1|[iu][1248]|f[248]|[SU]\d{1,7}))['"]"""),
    "fortran_order": re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)"""),
    "shape": re.compile(r"""['"]shape['"]\s*:\s*\(((?:\s*\d{1,19}L?\s*,)*(?:\s*\d{1,19}L?\s*)?)\)"""),
}
_PAIR = "|".join(field.pattern.replace("(True|False)", "(?:True|False)") for field in _FIELDS.values())
_DICT = re.compile(rf"\{{\s*(?:{_PAIR})\s*(?:,\s*(?:{_PAIR})\s*){{2}},?\s*\}}\s*")
_MOST_BYTES = 2**62
_DEFLATE_RATIO = 1032  # the most bytes that one deflated byte can become
_CHUNK = 2**20


class Header(NamedTuple):
    """The header of an array's file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool  # stored column by column
    offset: int  # bytes from the magic string to the data

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayFile:
    """An open .npy or .npz file. A .npy file has one array, named `arr_0`.

    Attributes:
        path: the file.
        names: the arrays in it, in the file's order.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile | None, size: int) -> None:
        self.path = path
        self._archive, self._size = archive, size
        self._members: dict[str, zipfile.ZipInfo] = {}
        if archive is None:
            self.names: tuple[str, ...] = (ONLY,)
            return
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise UsageError(f"{path} is no .npz file: it holds {member.filename[:60]!r}, which is no array")
            if name in self._members:
                raise UsageError(f"{path} is damaged: it holds two arrays named {name[:60]!r}")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UsageError(f"{path} is damaged: {name[:60]!r} is compressed by an unknown method")
            self._members[name] = member
        self.names = tuple(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def header(self, name: str = ONLY, shape: str = "...", kind: Any = np.generic) -> Header:
        """Shape and type of an array, checked; no data is read.

        Args:
            name: of the array.
            shape: the axes, each a length or a name for any length: "N H W 3". Axes of one name must be equal, "..."
                at the end stands for any number of axes, and an empty text for a single value.
            kind: a NumPy type or an abstract one: np.uint8, np.integer, np.floating, np.str_.

        Raises:
            UsageError: there is no such array, it is of another shape or type, or the file is damaged.
        """
        with self._reading(name), self._stream(name) as stream:
            return self._header(stream, name, shape, kind)

    def read(self, name: str = ONLY, shape: str = "...", kind: Any = np.generic) -> np.ndarray:
        """An array in memory, in C order and the machine's byte order; checked as by `header`.

        Raises:
            UsageError: as for `header`, or the data is damaged or ends early.
        """
        with self._reading(name), self._stream(name) as stream:
            header = self._header(stream, name, shape, kind)
            flat = np.empty(math.prod(header.shape), header.dtype)
            into = memoryview(flat.view(np.uint8).data if flat.nbytes else bytearray())
            done = 0
            while done < len(into):
                count = stream.readinto(into[done : done + _CHUNK])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError(f"it ends after {done} of {len(into)} bytes")
                done += count
            if stream.read(1):  # in an archive, this also compares the checksum
                raise ValueError("bytes follow after the array")
            array = flat.reshape(header.shape, order="F" if header.fortran else "C")
            return np.ascontiguousarray(array, header.dtype.newbyteorder("=")).reshape(header.shape)

    def map(self, name: str = ONLY, shape: str = "...", kind: Any = np.generic) -> np.ndarray:
        """An array mapped from the file: pages are read as they are used. A compressed one is read into memory.

        Mapped bytes are not compared with a checksum. Raises as `read`.
        """
        header = self.header(name, shape, kind)
        if self._compressed(name) or not header.nbytes:
            return self.read(name, shape, kind)
        with self._reading(name):
            start = self._start(name) + header.offset
            return np.memmap(self.path, header.dtype, "r", start, header.shape, "F" if header.fortran else "C")

    def rows(
        self, numbers: Sequence[int], name: str = ONLY, shape: str = "N ...", kind: Any = np.generic
    ) -> Iterator[np.ndarray]:
        """Rows of an array, for ascending numbers, one by one: 50,000 pictures of 256 px are 9.8 GB.

        Uncompressed arrays are mapped, compressed ones are read as a stream, which only goes forward. A pass over all
        rows of an archive's array ends with a comparison of the checksum. Raises as `read`.
        """
        header = self.header(name, shape, kind)
        if header.fortran and len(header.shape) > 1:
            raise UsageError(f"{self.path}: {name} lies column by column; save it in C order")
        row = Header(header.shape[1:], header.dtype, False, 0)
        with self._reading(name):
            if not self._compressed(name) and row.nbytes:
                yield from self._mapped_rows(name, numbers, header)
                return
            with self._stream(name) as stream:
                self._header(stream, name, shape, kind)
                position = 0
                for number in numbers:
                    data = b""
                    while position <= number:
                        data = stream.read(row.nbytes)
                        position += 1
                    if len(data) != row.nbytes:
                        raise EOFError(f"it is truncated in row {number} of {header.shape[0]}")
                    yield np.frombuffer(data, row.dtype).reshape(row.shape)
                if position == header.shape[0] and stream.read(1):
                    raise ValueError("bytes follow after the array")

    def _mapped_rows(self, name: str, numbers: Sequence[int], header: Header) -> Iterator[np.ndarray]:
        array = np.memmap(self.path, header.dtype, "r", self._start(name) + header.offset, header.shape)
        member = self._members.get(name)
        every = member is not None and len(numbers) == len(array)
        checksum = 0
        if every:
            with self.path.open("rb") as file:
                file.seek(self._start(name))
                checksum = zlib.crc32(file.read(header.offset))
        for number in numbers:
            if every:
                checksum = zlib.crc32(array[number], checksum)
            yield array[number]
        if every and member is not None and checksum != member.CRC:
            raise ValueError("its checksum differs")

    def _compressed(self, name: str) -> bool:
        member = self._members.get(name)
        return member is not None and member.compress_type != zipfile.ZIP_STORED

    def _start(self, name: str) -> int:
        """The offset of the array's magic string in the file."""
        if self._archive is None:
            return 0
        with self.path.open("rb") as file:
            # The local header repeats the name and has an extra field of its own; their lengths stand at byte 26.
            first = self._members[name].header_offset
            file.seek(first + 26)
            lengths = struct.unpack("<HH", file.read(4))
        return first + 30 + sum(lengths)

    @contextmanager
    def _stream(self, name: str) -> Iterator[IO[bytes]]:
        if self._archive is None:
            with self.path.open("rb") as stream:
                yield stream
        else:
            with self._archive.open(self._members[name]) as stream:
                yield stream

    def _header(self, stream: IO[bytes], name: str, shape: str, kind: Any) -> Header:
        header = _parsed(stream)
        member = self._members.get(name)
        if member is None:
            held = self._size
        elif self._compressed(name):
            held = min(member.file_size, member.compress_size * _DEFLATE_RATIO)
        else:
            held = min(member.file_size, self._size - self._start(name))
        if header.offset + header.nbytes > held:
            raise EOFError(f"it is truncated: {header.shape} of {header.dtype} do not fit in {held} bytes")
        if not np.issubdtype(header.dtype, kind) or not _fits(header.shape, shape):
            where = f"{self.path}: {name}" if self._archive is not None else f"{self.path}"
            raise UsageError(
                f"{where} is {header.dtype} {header.shape}; {kind.__name__} ({', '.join(shape.split())}) is needed"
            )
        return header

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        if name not in self.names:
            held = ", ".join(sorted(self.names)) or "nothing"
            raise UsageError(f"{self.path} holds {held}, not {name}")
        with _errors_in_one_line(self.path):
            yield


@contextmanager
def open_arrays(path: str | Path) -> Iterator[ArrayFile]:
    """Opens an .npz or .npy file, told apart by its first bytes.

    Raises:
        UsageError: there is no such file, or it is neither.
    """
    path = expanded(path)
    if not path.is_file():  # pipes and devices are no files either
        raise UsageError(f"{path} is not a file; give an .npz or .npy file")
    with _errors_in_one_line(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            single = file.read(len(_MAGIC)) == _MAGIC
    if single:
        yield ArrayFile(path, None, size)
        return
    with _errors_in_one_line(path, "cannot be read as .npz or .npy"):
        archive = zipfile.ZipFile(path)
    with archive:
        with _errors_in_one_line(path):
            opened = ArrayFile(path, archive, size)
        yield opened


def read_array(path: str | Path, shape: str = "...", kind: Any = np.generic, mapped: bool = False) -> np.ndarray:
    """The only array of a .npy or .npz file, in memory or mapped; see `ArrayFile.header` for `shape` and `kind`.

    Raises:
        UsageError: the file is missing or damaged, or holds another shape, another type or several arrays.
    """
    with open_arrays(path) as arrays:
        if len(arrays.names) != 1:
            raise UsageError(f"{path} holds {len(arrays.names)} arrays; a single one is needed")
        read = arrays.map if mapped else arrays.read
        return read(arrays.names[0], shape, kind)


class NpzWriter:
    """Writes an array into an .npz file row by row; the file appears when all rows are there.

    Args:
        path: the .npz file.
        shape: (N, ...), as the header needs it beforehand; (N, H, W, 3) for images of ADM's layout.
        key: the array's name.
        dtype: of the rows.
    """

    def __init__(self, path: str | Path, shape: tuple[int, ...], key: str = ONLY, dtype: Any = np.uint8) -> None:
        self.path, self.shape, self.key = Path(path), shape, key
        self.dtype = np.dtype(dtype)
        self._written = 0

    def __enter__(self) -> Self:
        self._atomic = atomic(self.path)
        self._archive = zipfile.ZipFile(self._atomic.__enter__(), "w", zipfile.ZIP_STORED)
        self._member = self._archive.open(zipfile.ZipInfo(f"{self.key}.npy"), "w", force_zip64=True)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(
            self._member, {"descr": descr, "fortran_order": False, "shape": self.shape}
        )
        return self

    def add(self, rows: np.ndarray) -> None:
        """Appends rows (B, ...) of the type and shape that were announced."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape[1:]:
            raise UsageError(
                f"images must be {self.dtype} (B, {str(self.shape[1:])[1:]}, got {rows.dtype} {rows.shape}"
            )
        self._member.write(np.ascontiguousarray(rows).data)
        self._written += len(rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._member.close()
        self._archive.close()
        if kind is None and self._written != self.shape[0]:
            short = UsageError(f"{self.path} was to hold {self.shape[0]} images, got {self._written}")
            self._atomic.__exit__(UsageError, short, None)
            raise short
        self._atomic.__exit__(kind, error, trace)


@contextmanager
def _errors_in_one_line(path: Path, what: str = "is damaged") -> Iterator[None]:
    """Turns whatever damaged bytes raise into one line."""
    try:
        yield
    except UsageError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} {what}: {reason[:200]}") from None


def _parsed(stream: IO[bytes]) -> Header:
    """Reads the header of a .npy stream, so that the stream stands at the data."""
    start = stream.read(8)
    if len(start) != 8 or start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise ValueError("it does not begin like an array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header of {length} bytes is too long")
    text = stream.read(length)
    if len(text) != length:
        raise EOFError("it ends in its header")
    header = text.decode("latin-1")
    found = {key: pattern.findall(header) for key, pattern in _FIELDS.items()}
    if not _DICT.fullmatch(header) or any(len(values) != 1 for values in found.values()):
        raise ValueError(f"its header names no shape and no type of plain numbers or text: {header[:80]}")
    dtype = np.dtype(found["descr"][0])
    shape = tuple(int(axis) for axis in re.findall(r"\d+", found["shape"][0]))
    if len(shape) > 32:
        raise ValueError(f"its header has {len(shape)} axes")
    if math.prod(max(axis, 1) for axis in shape) * max(dtype.itemsize, 1) > _MOST_BYTES:
        raise ValueError(f"its header asks for too much: {shape}")
    return Header(shape, dtype, found["fortran_order"][0] == "True", 8 + width + length)


def _fits(shape: tuple[int, ...], wanted: str) -> bool:
    """Whether a shape is as "N H W 3" says."""
    axes = wanted.split()
    if axes and axes[-1] == "...":
        axes = axes[:-1]
        shape = shape[: len(axes)] if len(shape) >= len(axes) else (-1,)
    if len(axes) != len(shape):
        return False
    lengths: dict[str, int] = {}
    return all(
        length == int(axis) if axis.isdigit() else lengths.setdefault(axis, length) == length
        for axis, length in zip(axes, shape, strict=True)
    )
