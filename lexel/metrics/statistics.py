"""Reference statistics on disk, in the .npz layouts that published evaluators read and write, and .npz image sets.

Layouts read: ADM's (`mu sigma mu_s sigma_s arr_0`), pytorch-fid's and clean-fid's (`mu sigma`). Written: the same keys,
so that those tools read our files, and beside them `n`, `features` and `about` (JSON), which they ignore.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexel.arrays import ONLY, ArrayFile, open_arrays
from lexel.checkpoint import atomic
from lexel.errors import UsageError
from lexel.metrics.moments import Moments

# What `about` may hold and a comparison reads, by type; other entries are left alone.
_ABOUT = {"network": dict, "choices": dict, "statistics": str, "data": str}
_NETWORK = {"name": str, "fingerprint": str, "resize": str}


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the real images of a comparison."""

    pooled: Moments  # of the features that FID is taken over
    spatial: Moments | None = None  # of the features of sFID, flattened height, width, channel
    features: Tensor | None = None  # float32 (M, D) pooled features themselves, for precision, recall and KID
    about: dict[str, Any] = field(default_factory=dict)  # protocol, network, fingerprints; empty in others' files


def read_statistics(path: str | Path) -> ReferenceStatistics:
    """Reads a statistics file of any of the layouts named above; images in it are left alone (`NpzImages`).

    Raises:
        UsageError: the file is missing, damaged, or holds no mean and covariance.
    """
    with open_arrays(path) as arrays:
        pooled = _moments(arrays, "mu", "sigma")
        if pooled is None:
            held = ", ".join(sorted(arrays.names)) or "nothing"
            raise UsageError(f"{path} has no statistics: it holds {held}, not mu, sigma")
        features = None
        if "features" in arrays:
            features = _tensor(arrays, "features", f"M {len(pooled.mean)}", np.floating).float()
        about = _about(str(arrays.read("about", "", np.str_)), arrays.path) if "about" in arrays else {}
        return ReferenceStatistics(pooled, _moments(arrays, "mu_s", "sigma_s"), features, about)


def _moments(arrays: ArrayFile, mean: str, covariance: str) -> Moments | None:
    if mean not in arrays or covariance not in arrays:
        return None
    mu = _tensor(arrays, mean, "D", np.floating)
    sigma = _tensor(arrays, covariance, f"{len(mu)} {len(mu)}", np.floating)
    n = int(arrays.read("n", "", np.integer)) if "n" in arrays else None
    if n is not None and n < 2:
        raise UsageError(f"{arrays.path} is damaged: its statistics are of {n} images")
    return Moments(mu.double(), sigma.double(), n)


def _tensor(arrays: ArrayFile, name: str, shape: str, kind: Any) -> Tensor:
    values = torch.from_numpy(arrays.read(name, shape, kind))
    if not values.isfinite().all():
        raise UsageError(f"{arrays.path} is damaged: {name} holds values that are not finite")
    return values


def _about(text: str, path: Path) -> dict[str, Any]:
    """The metadata of a file of statistics, checked as far as it is compared with anything."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: about is no JSON: {error}") from None
    fields: list[tuple[Any, Mapping[str, type]]] = [(about, _ABOUT)]
    if isinstance(about, dict) and isinstance(about.get("network"), dict):
        missing = _NETWORK.keys() - about["network"].keys()
        if missing:
            raise UsageError(f"{path} is damaged: about.network has no {', '.join(sorted(missing))}")
        fields.append((about["network"], _NETWORK))
    for table, types in fields:
        if not isinstance(table, dict):
            raise UsageError(f"{path} is damaged: about is no JSON object")
        for name, kind in types.items():
            if name in table and not isinstance(table[name], kind):
                raise UsageError(f"{path} is damaged: about.{name} is {str(table[name])[:40]!r}, not a {kind.__name__}")
    return about


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
    """The uint8 images (N, H, W, 3) in `arr_0` of an .npz (or .npy) file, a few at a time: 50,000 of 256 px are 9.8 GB.

    Args:
        path: the file.

    Raises:
        UsageError: the file is missing or damaged, or the array is missing or no such images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_arrays(path) as arrays:
            if ONLY not in arrays:
                held = ", ".join(sorted(arrays.names)) or "nothing"
                raise UsageError(f"{path} holds no images: it has {held}, not {ONLY}")
            self.shape = arrays.header(ONLY, "N H W 3", np.uint8).shape
        if min(self.shape[1:3]) < 1:
            raise UsageError(f"{path} holds images without pixels: {self.shape}")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (numbers int64 (B,), images uint8 (B, H, W, 3)) for ascending image numbers.

        Raises:
            UsageError: the data is damaged, or ends before the header says.
        """
        with open_arrays(self.path) as arrays:
            chunk: list[np.ndarray] = []
            for position, row in enumerate(arrays.rows(numbers, ONLY, "N H W 3", np.uint8)):
                chunk.append(row)
                if len(chunk) == batch_size or position + 1 == len(numbers):
                    first = position + 1 - len(chunk)
                    chosen = torch.tensor(list(numbers[first : position + 1]))
                    yield chosen, torch.from_numpy(np.stack(chunk))
                    chunk = []
