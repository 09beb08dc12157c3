"""Layouts of the tokens of a set: one grid for all images, or each image's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lexel.data.tokens.format import Manifest, ShardDescription
from lexel.token_spec import TokenSpec


class Layouts(NamedTuple):
    """The layouts of a set's images, by their rows in all shards."""

    specs: list[TokenSpec]  # the different ones
    layout: np.ndarray | None  # int32 (rows,): which of them each image has; None where there is one for all
    starts: np.ndarray  # int64 (rows,): the place of its first token in its shard; empty with one for all
    sizes: np.ndarray | None  # int64 (rows, 2): height and width in pixels before padding; None with one for all

    @classmethod
    def of_shards(cls, shards: Sequence[ShardDescription], manifest: Manifest) -> "Layouts":
        """Puts together what the shards of a set say."""
        if manifest.grid is not None:
            return cls([manifest.token_spec], None, np.empty(0, np.int64), None)
        numbers: dict[TokenSpec, int] = {}
        layouts, starts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        sizes = [np.empty((0, 2), np.int64)]
        for shard in shards:
            own = [
                TokenSpec(tuple(tuple(grid) for grid in grids), manifest.codebook_size, manifest.books)
                for grids in shard.layouts or ()
            ]
            places = np.array([numbers.setdefault(spec, len(numbers)) for spec in own], np.int32)
            chosen = np.array(shard.layout, np.int64)
            ends = np.cumsum(np.array([spec.length for spec in own], np.int64)[chosen])
            layouts.append(places[chosen])
            starts.append(np.concatenate([np.zeros(1, np.int64), ends])[: len(chosen)])
            sizes.append(np.array(shard.sizes, np.int64).reshape(-1, 2))
        return cls(list(numbers), np.concatenate(layouts), np.concatenate(starts), np.concatenate(sizes))

    @property
    def own(self) -> bool:
        """Whether each image has its own."""
        return self.layout is not None

    def which(self, rows: np.ndarray) -> np.ndarray:
        """The number in `specs` of the layout of each of some rows."""
        return np.zeros(len(rows), np.int32) if self.layout is None else self.layout[rows]

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The different layouts of some rows; that of the set where all have one, even if there is no row."""
        return np.zeros(1, np.int32) if self.layout is None else np.unique(self.layout[rows])

    def tokens_of(self, first: int, end: int) -> int:
        """Tokens of the images in the rows [first, end)."""
        counts = np.array([spec.length for spec in self.specs], np.int64)
        return int(counts[self.which(np.arange(first, end))].sum()) if end > first else 0


def described(layouts: Sequence[TokenSpec], sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The part of a shard's .json about images with layouts of their own."""
    different = list(dict.fromkeys(layouts))
    numbers = {spec: number for number, spec in enumerate(different)}
    return {
        "layouts": [[list(grid) for grid in spec.grids] for spec in different],
        "layout": [numbers[spec] for spec in layouts],
        "sizes": [list(size) for size in sizes],
    }
