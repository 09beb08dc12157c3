"""Features of numbered images in files: made once, block by block, by one process or by parts of the work."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lexel import checkpoint
from lexel.arrays import read_array
from lexel.checkpoint import atomic_write
from lexel.data.tokens.format import Count, Description, checked, sealed
from lexel.data.tokens.write import write_indices
from lexel.errors import UsageError
from lexel.parts import Part
from lexel.regular import sha256_of
from lexel.runtime import ProgressCallback

FILE_BYTES = 2**26  # of a file of features, about: what a stopped part makes again


class _Block(Description):
    """What stands beside a file of features."""

    identity: str
    sha256: str
    bytes: Count


class FeatureFiles:
    """The features (N, T, D) of images, float32, in files of whole batches.

    Args:
        folder: made if it is not there; a block is a .npy file and then, once it is whole, its .json.
        make: features (B, T, D) of images by their numbers.
        count: N.
        batch_size: images whose features are made together, whoever makes them.
        identity: of what the features are; files of others are refused.
    """

    def __init__(
        self, folder: Path, make: Callable[[np.ndarray], Tensor], count: int, batch_size: int, identity: str
    ) -> None:
        self.folder, self.make, self.count, self.batch_size, self.identity = folder, make, count, batch_size, identity
        self.shape = tuple(make(np.arange(min(1, count))).shape[1:])
        self.rows = batch_size * max(1, FILE_BYTES // (4 * batch_size * int(np.prod(self.shape))))
        self._blocks: dict[int, np.ndarray] = {}

    def write(self, part: Part, report: ProgressCallback | None = None) -> int:
        """Makes the missing files of a part; returns how many images the part has."""
        numbers = part.blocks(self.count, self.rows)
        for first in range(numbers.start, numbers.stop, self.rows):
            end = min(first + self.rows, self.count)
            if not self._path(first, ".json").is_file():
                starts = range(first, end, self.batch_size)
                batches = [self.make(np.arange(start, min(start + self.batch_size, end))) for start in starts]
                facts = write_indices(self._path(first, ".npy"), torch.cat(batches).numpy().astype("<f4", copy=False))
                with atomic_write(self._path(first, ".json")) as file:
                    file.write(sealed({"identity": self.identity, **facts}))
            else:
                self._checked(first)
            if report is not None:
                report(end - numbers.start, len(numbers))
        return len(numbers)

    def __call__(self, numbers: np.ndarray) -> Tensor:
        """The features of some images, of which all files are there."""
        result = np.empty((len(numbers), *self.shape), np.float32)
        blocks = np.asarray(numbers) // self.rows
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            result[chosen] = self._block(block)[np.asarray(numbers)[chosen] - block * self.rows]
        return torch.from_numpy(result)

    def _block(self, block: int) -> np.ndarray:
        if block not in self._blocks:
            first = block * self.rows
            path, described = self._path(first, ".npy"), self._checked(first)
            if sha256_of(path) != described.sha256:
                raise UsageError(f"{path} is damaged: its content does not match its checksum; delete it and its .json")
            shape = " ".join(map(str, (min(self.rows, self.count - first), *self.shape)))
            self._blocks[block] = read_array(path, shape, np.float32, mapped=True)
        return self._blocks[block]

    def _checked(self, first: int) -> _Block:
        path = self._path(first, ".json")
        described = checked(path, checkpoint.read_json(path), _Block)
        if described.identity != self.identity:
            raise UsageError(
                f"{self.folder} holds features of other images or settings; give another folder or delete it"
            )
        return described

    def _path(self, first: int, suffix: str) -> Path:
        return self.folder / f"features-{first:09d}{suffix}"
