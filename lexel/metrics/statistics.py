"""Reference statistics on disk, in the .npz layouts that published evaluators read and write, and .npz image sets.

Layouts read: ADM's (`mu sigma mu_s sigma_s arr_0`), pytorch-fid's and clean-fid's (`mu sigma`). Written: the same keys,
so that those tools read our files, and beside them `n`, `features` and `about` (JSON), which they ignore.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from lexel.checkpoint import atomic
from lexel.errors import UsageError
from lexel.metrics.moments import Moments


@dataclass(frozen=True)
class ReferenceStatistics:
    """What is known of the real side of a comparison."""

    pooled: Moments  # of the features that FID is taken over
    spatial: Moments | None = None  # of the features of sFID, flattened height, width, channel
    features: Tensor | None = None  # float32 (M, D) pooled features themselves, for precision, recall and KID
    about: dict[str, Any] = field(default_factory=dict)  # protocol, network, fingerprints; empty in others' files


def read_statistics(path: str | Path) -> ReferenceStatistics:
    """Reads a statistics file of any of the layouts named above; images in it are left alone (`NpzImages`).

    Raises:
        UsageError: the file is missing, damaged, or holds no mean and covariance.
    """
    path = Path(path)
    with _opened(path) as archive:
        arrays = set(archive.files)
        if not {"mu", "sigma"} <= arrays:
            raise UsageError(
                f"{path} has no statistics: it holds {', '.join(sorted(arrays)) or 'nothing'}, not mu, sigma"
            )

        def read(key: str) -> Tensor | None:
            return torch.from_numpy(np.ascontiguousarray(archive[key])) if key in arrays else None

        def moments(mean: str, covariance: str) -> Moments | None:
            mu, sigma, n = read(mean), read(covariance), read("n")
            if mu is None or sigma is None:
                return None
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                raise UsageError(
                    f"{path}: {mean} is {tuple(mu.shape)} and {covariance} {tuple(sigma.shape)}; not moments"
                )
            return Moments(mu.double(), sigma.double(), None if n is None else int(n))

        try:
            pooled = moments("mu", "sigma")
            assert pooled is not None
            about = json.loads(str(archive["about"])) if "about" in arrays else {}
            return ReferenceStatistics(pooled, moments("mu_s", "sigma_s"), read("features"), about)
        except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise error if isinstance(error, UsageError) else UsageError(f"{path} is damaged: {error}") from None


def arrays_in(path: str | Path) -> set[str]:
    """The names of the arrays in an .npz file.

    Raises:
        UsageError: there is no such file, or it is no .npz.
    """
    with _opened(Path(path)) as archive:
        return set(archive.files)


def write_statistics(path: str | Path, statistics: ReferenceStatistics) -> None:
    """Writes statistics as .npz (`mu`, `sigma`, ... in float64), atomically."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UsageError(f"statistics are written as .npz, got {path.name}")
    arrays: dict[str, Any] = {"mu": statistics.pooled.mean.numpy(), "sigma": statistics.pooled.covariance.numpy()}
    if statistics.pooled.n is not None:
        arrays["n"] = np.int64(statistics.pooled.n)
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean.numpy(), "sigma_s": statistics.spatial.covariance.numpy()}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    arrays["about"] = np.array(json.dumps(statistics.about, sort_keys=True))
    with atomic(path) as partial:
        np.savez(partial, **arrays)


class NpzImages:
    """The uint8 images (N, H, W, 3) in an .npz file, read a few at a time: 50,000 of 256 px are 9.8 GB.

    An uncompressed member is mapped, a compressed one is read as a stream, which only goes forward.

    Args:
        path: the .npz file.
        key: the array in it; `arr_0` is ADM's.

    Raises:
        UsageError: the file is missing or damaged, or the array is missing or no such images.
    """

    def __init__(self, path: str | Path, key: str = "arr_0") -> None:
        self.path, self.key = Path(path), key
        with _opened(self.path) as archive:
            if key not in archive.files:
                held = ", ".join(sorted(archive.files)) or "nothing"
                raise UsageError(f"{path} holds no images: it has {held}, not {key}")
        with zipfile.ZipFile(self.path) as archive:
            member = archive.getinfo(f"{key}.npy")
            self._mapped = member.compress_type == zipfile.ZIP_STORED
            with archive.open(member) as stream:
                self.shape = _header(stream, self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, numbers: Iterable[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (numbers int64 (B,), images uint8 (B, H, W, 3)) for ascending image numbers.

        Raises:
            UsageError: the data ends before the header says.
        """
        rows = self._from_map(numbers) if self._mapped else self._from_stream(numbers)
        chunk: list[tuple[int, np.ndarray]] = []
        for row in rows:
            chunk.append(row)
            if len(chunk) == batch_size:
                yield _stacked(chunk)
                chunk = []
        if chunk:
            yield _stacked(chunk)

    def _from_map(self, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
            # The local header repeats the name and has its own extra field, whose length stands at byte 28.
            offset = archive.getinfo(f"{self.key}.npy").header_offset
            file.seek(offset + 26)
            name, extra = np.frombuffer(file.read(4), "<u2").tolist()
            file.seek(offset + 30 + name + extra)
            _header(file, self.path)
            start = file.tell()
        if self.path.stat().st_size < start + int(np.prod(self.shape)):
            raise UsageError(f"{self.path} is truncated: {self.key} should hold {self.shape[0]} images")
        images = np.memmap(self.path, np.uint8, "r", start, self.shape)
        for number in numbers:
            yield number, images[number]

    def _from_stream(self, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as stream:
            _header(stream, self.path)
            position = 0
            for number in numbers:
                while position <= number:
                    data = stream.read(size)
                    position += 1
                if len(data) != size:
                    raise UsageError(f"{self.path} is truncated: image {number} of {self.shape[0]} is not whole")
                yield number, np.frombuffer(data, np.uint8).reshape(self.shape[1:])


class NpzWriter:
    """Writes images into an .npz file of ADM's layout as they come; the file appears when all are there.

    Args:
        path: the .npz file.
        shape: (N, H, W, 3), as the header needs it beforehand.
        key: the array's name.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int, int], key: str = "arr_0") -> None:
        self.path, self.shape, self.key = Path(path), shape, key
        self._written = 0

    def __enter__(self) -> Self:
        self._atomic = atomic(self.path)
        self._archive = zipfile.ZipFile(self._atomic.__enter__(), "w", zipfile.ZIP_STORED)
        self._member = self._archive.open(zipfile.ZipInfo(f"{self.key}.npy"), "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._member, header)
        return self

    def add(self, images: np.ndarray) -> None:
        """Appends uint8 images (B, H, W, 3)."""
        if images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            raise UsageError(f"images must be uint8 (B, {str(self.shape[1:])[1:]}, got {images.dtype} {images.shape}")
        self._member.write(np.ascontiguousarray(images).data)
        self._written += len(images)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._member.close()
        self._archive.close()
        if kind is None and self._written != self.shape[0]:
            short = UsageError(f"{self.path} was to hold {self.shape[0]} images, got {self._written}")
            self._atomic.__exit__(UsageError, short, None)
            raise short
        self._atomic.__exit__(kind, error, trace)


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give an .npz file")
    try:
        opened = np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path} cannot be read as .npz: {error}") from None
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise UsageError(f"{path} is a single array; an .npz file was expected")
    return opened


def _header(stream: IO[bytes], path: Path) -> tuple[int, ...]:
    """The shape in a .npy header, read so that the stream stands at the data."""
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise UsageError(f"{path} holds {dtype} {shape}; images are uint8 (N, H, W, 3)")
    return shape


def _stacked(chunk: list[tuple[int, np.ndarray]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([number for number, _ in chunk]), torch.from_numpy(np.stack([image for _, image in chunk]))
