"""Token sets as sequences for language models: one flat file of integers with an index, read back exactly.

The convention. A sequence is `caption, begin, row, separator, row, separator, ..., end`. A code c of the image is the
id `offset + c`; of several codes a place (residual and product quantizers, grid (Q, h, w)) those of one place stand
together and code q is `offset + q * codebook_size + c`. Three ids follow the codes: the separator that ends a row,
begin, end. Ids below `offset` are those of a text vocabulary, whose ids of a caption may precede `begin`. With `sides`
two more ids follow `begin`, the rows and the columns of the grid, so that one model learns images of several sizes:
`caption, begin, rows, columns, row, separator, ..., end`. So have all sequences of images in their own sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from lexel import checkpoint
from lexel.arrays import read_array
from lexel.checkpoint import atomic_write
from lexel.data.tokens.format import Count, Description, Positive, checked, sealed
from lexel.data.tokens.token_set import TokenSet
from lexel.errors import UsageError
from lexel.regular import open_regular

FORMAT, VERSION = "lexel sequences", 1
OWN_GRIDS = 2  # the version in which each sequence says its grid
DATA, INDEX, FACTS = "tokens.bin", "tokens.index.npy", "sequences.json"

TextIds = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class SequenceFormat:
    """Conversion of an image's indices to ids of a language model, and back.

    Args:
        grid: shape of an image's indices: (T,), (h, w) or (Q, h, w).
        codebook_size: indices lie below it.
        offset: the first id of a code: how many ids a text vocabulary has before.
        rows: whether a separator ends each row of a grid.
        ends: whether begin and end stand around the image.
        sides: ids for each of rows and columns, which then stand before the codes: the largest side of any grid that
            shares the vocabulary; 0 for none.
    """

    grid: tuple[int, ...]
    codebook_size: int
    offset: int = 0
    rows: bool = True
    ends: bool = True
    sides: int = 0

    def __post_init__(self) -> None:
        if self.offset < 0 or len(self.grid) not in (1, 2, 3):
            found = f"{self.offset}, {self.grid}"
            raise UsageError(f"sequences need an offset from 0 and a grid of 1 to 3 axes, got {found}")
        if self.sides and (len(self.grid) == 1 or max(self.grid[-2:]) > self.sides):
            raise UsageError(
                f"sides = {self.sides} must be 0 or at least the rows and columns of the grid, got {self.grid}"
            )

    def of_grid(self, grid: Sequence[int]) -> "SequenceFormat":
        """The same vocabulary for another grid.

        Raises:
            UsageError: there are no `sides` by which sequences would differ, or the grid is larger than they are.
        """
        if not self.sides:
            raise UsageError(
                "sequences of images in their own sizes must say them: give sides, the most rows or columns"
            )
        return replace(self, grid=tuple(grid))

    @property
    def books(self) -> int:
        """Codes a place."""
        return self.grid[0] if len(self.grid) == 3 else 1

    @property
    def separator(self) -> int:
        return self.offset + self.books * self.codebook_size

    @property
    def begin(self) -> int:
        return self.separator + 1

    @property
    def end(self) -> int:
        return self.separator + 2

    @property
    def vocabulary_size(self) -> int:
        """Ids in all, those of the text included."""
        return self.separator + 3 + 2 * self.sides

    @property
    def size_ids(self) -> tuple[int, ...]:
        """The ids of the grid's rows and columns; none without `sides`."""
        if not self.sides:
            return ()
        rows, columns = self.grid[-2:]
        return self.end + rows, self.end + self.sides + columns

    def size_of(self, ids: np.ndarray) -> tuple[int, int]:
        """Rows and columns that a sequence of this vocabulary says it has, whatever grid this format has.

        Raises:
            UsageError: it does not say.
        """
        body = np.asarray(ids, np.int64)
        first = np.flatnonzero(body == self.begin)[:1] + 1 if self.ends else np.flatnonzero(body > self.end)[:1]
        for at in first.tolist():
            rows, columns = (body[at : at + 2] - self.end).tolist() if len(body) > at + 1 else (0, 0)
            if 1 <= rows <= self.sides < columns <= 2 * self.sides:
                return rows, columns - self.sides
        raise UsageError(f"this sequence does not say its rows and columns: {body[:8].tolist()} ...")

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where it suffices, else uint32, little-endian."""
        return np.dtype("<u2" if self.vocabulary_size <= 2**16 else "<u4")

    def ids(self, indices: np.ndarray) -> np.ndarray:
        """Sequences (N, L) of indices (N, *grid), without captions."""
        places = np.asarray(indices, np.int64)
        if len(self.grid) == 3:
            shift = np.arange(self.books) * self.codebook_size
            places = np.moveaxis(places + shift[:, None, None], 1, -1)  # (N, h, w, Q)
        lines = (places + self.offset).reshape(len(places), self._lines, -1)
        if self._separated:
            lines = np.concatenate([lines, np.full((*lines.shape[:2], 1), self.separator)], -1)
        flat = lines.reshape(len(places), -1)
        one = np.ones((len(places), 1), np.int64)
        if self.sides:
            flat = np.concatenate([np.array(self.size_ids) * one, flat], 1)
        if self.ends:
            flat = np.concatenate([self.begin * one, flat, self.end * one], 1)
        return flat

    def indices(self, ids: np.ndarray) -> np.ndarray:
        """The indices (*grid) of one sequence; a caption before it is passed over.

        Raises:
            UsageError: it is no sequence of this format.
        """
        body = np.asarray(ids, np.int64)[-self.length :]
        wrong = UsageError(f"this is no sequence of a {'x'.join(map(str, self.grid))} grid: {len(ids)} ids")
        if len(body) != self.length:
            raise wrong
        if self.ends:
            if body[0] != self.begin or body[-1] != self.end:
                raise wrong
            body = body[1:-1]
        if self.sides:
            if tuple(body[:2].tolist()) != self.size_ids:
                raise wrong
            body = body[2:]
        lines = body.reshape(self._lines, -1)
        if self._separated:
            if (lines[:, -1] != self.separator).any():
                raise wrong
            lines = lines[:, :-1]
        places = lines.reshape(-1, self.books) - self.offset - np.arange(self.books) * self.codebook_size
        if places.min() < 0 or places.max() >= self.codebook_size:
            raise wrong
        if len(self.grid) == 3:
            return np.moveaxis(places.reshape(*self.grid[1:], self.books), -1, 0)
        return places.reshape(self.grid)

    @property
    def length(self) -> int:
        """Ids of an image, without a caption."""
        return int(np.prod(self.grid)) + self._lines * self._separated + 2 * self.ends + 2 * bool(self.sides)

    @property
    def _lines(self) -> int:
        return self.grid[-2] if len(self.grid) > 1 else 1

    @property
    def _separated(self) -> bool:
        return self.rows and len(self.grid) > 1


class _Facts(Description):
    """The contents of `sequences.json`."""

    format: str
    version: int
    grid: Annotated[list[Positive], Field(min_length=1, max_length=3)] | None  # None: each sequence says its own
    books: Positive | None = None  # codes a place, where there is no grid
    sizes: list[Annotated[list[Positive], Field(min_length=2, max_length=2)]] | None = (
        None  # height and width of each image before padding, likewise
    )
    codebook_size: Positive
    offset: Count
    rows: bool
    ends: bool
    sides: Count = 0
    dtype: str
    separator: Count
    begin: Count
    end: Count
    vocabulary_size: Count
    crops: Positive
    images: Count
    ids: Count
    captions: bool
    fingerprint: str
    names: list[str]
    labels: list[Count] | None
    classes: list[str]
    texts: list[str] | None = None  # captions as they are; left out in what was written before

    @model_validator(mode="after")
    def _one_text_an_image(self) -> "_Facts":
        if self.texts is not None and len(self.texts) != self.images:
            raise ValueError(f"there are {len(self.texts)} texts for {self.images} images")
        if self.grid is None and (not self.sides or self.sizes is None or len(self.sizes) != self.images):
            raise ValueError(f"without a grid there must be sides, and a size for each of {self.images} images")
        return self


class SequenceSet:
    """Sequences in a folder, mapped into memory.

    Attributes:
        format: how ids and indices belong together; where images have grids of their own, of the largest there may be
            (`format_of` has that of a sequence).
        own_grids: whether they have.
        sizes: height and width of each image before it was padded to its grid; None with one grid.
        ids: all sequences, one after the other: uint16 or uint32.
        names, labels, classes: of the images; sequence s is version s % crops of image s // crops.
        captions: one per image, or None; `text_ids` of the export made the ids before `begin` of them.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens what `export_sequences` wrote.

        Raises:
            UsageError: the folder holds no sequences, or they are damaged.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise UsageError(f"{folder} holds no sequences: it has no {FACTS}")
        facts = checked(folder / FACTS, checkpoint.read_json(folder / FACTS), _Facts)
        self.own_grids = facts.grid is None
        if facts.format != FORMAT or facts.version != (OWN_GRIDS if self.own_grids else VERSION):
            raise UsageError(f"{folder / FACTS} does not describe sequences of version {VERSION} or {OWN_GRIDS}")
        grid = largest(facts.books, facts.sides) if facts.grid is None else tuple(facts.grid)
        self.format = SequenceFormat(grid, facts.codebook_size, facts.offset, facts.rows, facts.ends, facts.sides)
        self.names, self.labels, self.classes, self.crops = facts.names, facts.labels, facts.classes, facts.crops
        self.captions, self.sizes = facts.texts, facts.sizes
        self._index = read_array(folder / INDEX, f"{facts.images * facts.crops + 1}", np.int64)
        size = (folder / DATA).stat().st_size if (folder / DATA).is_file() else 0
        steps = np.diff(self._index)
        least = self.format.of_grid((*grid[:-2], 1, 1)) if self.own_grids else self.format
        whole = facts.ids == self._index[-1] and size == facts.ids * self.format.dtype.itemsize
        if not whole or self._index[0] != 0 or (steps < least.length).any():
            raise UsageError(f"{folder} is damaged: {DATA} or {INDEX} are not as {FACTS} says; export it again")
        with open_regular(folder / DATA):  # refuses anything but a file
            self.ids = np.memmap(folder / DATA, self.format.dtype, "r") if size else np.empty(0, self.format.dtype)

    def __len__(self) -> int:
        return len(self._index) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """The ids of a sequence, its caption's first."""
        number = range(len(self))[number]
        return self.ids[self._index[number] : self._index[number + 1]]

    def format_of(self, number: int) -> SequenceFormat:
        """How ids and indices of a sequence belong together, by the rows and columns that it says it has.

        Raises:
            UsageError: it does not say them.
        """
        if not self.own_grids:
            return self.format
        return self.format.of_grid((*self.format.grid[:-2], *self.format.size_of(self[number])))

    def indices(self, number: int) -> np.ndarray:
        """The indices (*grid) of a sequence's image."""
        return self.format_of(number).indices(self[number])


def largest(books: int | None, sides: int) -> tuple[int, ...]:
    """The grid of the most rows and columns that ids of `sides` can say."""
    return (sides, sides) if books is None else (books, sides, sides)


def own_grids(tokens: TokenSet) -> list[tuple[int, ...]]:
    """The grids (rows, columns) of images in their own sizes; none where all have one, or no rows and columns."""
    if not tokens.own_grids:
        return []
    specs = list(tokens.buckets())
    return [spec.grids[0] for spec in specs] if all(len(s.grids) == 1 and len(s.grids[0]) == 2 for s in specs) else []


def export_sequences(
    tokens: TokenSet,
    folder: str | Path,
    offset: int = 0,
    rows: bool = True,
    ends: bool = True,
    text_ids: TextIds | None = None,
    sides: int = 0,
) -> SequenceSet:
    """Writes a token set as sequences: `tokens.bin`, `tokens.index.npy` (where each begins) and `sequences.json`.

    Args:
        tokens: the set; each version of an image is a sequence.
        folder: new.
        offset, rows, ends, sides: see `SequenceFormat`. Images in their own sizes always have `sides`, by default the
            most rows or columns of any.
        text_ids: makes ids below `offset` of a caption; the set must have captions.

    Raises:
        UsageError: the folder is not empty, or a caption's ids are not below `offset`.
    """
    folder = new_folder(folder)
    grids = own_grids(tokens)
    sides = sides or max((side for grid in grids for side in grid), default=0)
    grid = largest(tokens.books, sides) if grids else tokens.grid
    form = SequenceFormat(grid, tokens.codebook_size, offset, rows, ends, sides)
    for grid in grids:
        form.of_grid((*form.grid[:-2], *grid))  # raises where sides are too few
    if text_ids is not None and tokens.captions is None:
        raise UsageError(f"the tokens in {tokens.folder} have no captions")
    index = [0]
    with atomic_write(folder / DATA) as file:
        for number in range(len(tokens)):
            caption = np.empty(0, np.int64)
            if text_ids is not None and tokens.captions is not None:
                caption = np.asarray(text_ids(tokens.captions[number]), np.int64)
                if caption.size and (caption.min() < 0 or caption.max() >= offset):
                    most = caption.max()
                    raise UsageError(f"ids of a caption must lie in [0, {offset}), got up to {most}; raise offset")
            indices = tokens.tokens([number] * tokens.crops, np.arange(tokens.crops)).numpy()
            sequences = (form.of_grid(indices.shape[1:]) if grids else form).ids(indices)
            for sequence in sequences:
                file.write(np.concatenate([caption, sequence]).astype(form.dtype).tobytes())
                index.append(index[-1] + len(caption) + len(sequence))
    with atomic_write(folder / INDEX) as file:
        np.save(file, np.array(index, np.int64))
    facts = {
        "format": FORMAT, "version": OWN_GRIDS if grids else VERSION, "grid": None if grids else list(form.grid),
        "codebook_size": form.codebook_size,
        "offset": offset, "rows": rows, "ends": ends, "dtype": form.dtype.name, "separator": form.separator,
        "begin": form.begin, "end": form.end, "vocabulary_size": form.vocabulary_size, "crops": tokens.crops,
        "images": len(tokens), "ids": index[-1], "captions": text_ids is not None, "fingerprint": tokens.fingerprint,
        "names": list(tokens.names), "labels": None if tokens.labels is None else tokens.labels.tolist(),
        "classes": tokens.classes, **({"sides": sides} if sides else {}),
        **({"books": tokens.books, "sizes": tokens.sizes.tolist()} if grids and tokens.sizes is not None else {}),
        **({} if tokens.captions is None else {"texts": list(tokens.captions)}),
    }  # fmt: skip
    with atomic_write(folder / FACTS) as file:
        file.write(sealed(facts))
    return SequenceSet(folder)


def new_folder(folder: str | Path) -> Path:
    """A folder to write to that is not there yet, or empty."""
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; give a new folder")
    return folder
