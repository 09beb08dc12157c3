"""Image sets in Parquet files: a column of encoded images, and optionally labels, captions and names."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lexel.data.columns import CAPTION, LABEL, find_column
from lexel.data.files import Decoding, in_words
from lexel.data.folder import NoSplit
from lexel.data.held_out import class_numbers
from lexel.data.images import EncodedImages, ImageSet, digest, size_and_date
from lexel.data.names import numbered
from lexel.data.options import OpenOptions, parse_query
from lexel.data.shard_locations import expand
from lexel.errors import UsageError
from lexel.regular import open_regular

IMAGE = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes")
NAME = ("name", "file_name", "filename", "path", "key", "__key__")


class ParquetImages(EncodedImages):
    """Pictures in Parquet files. Pictures of one row group are read together, and the last group is kept.

    Args:
        decoding: how bytes become arrays.
        files: the Parquet files.
        column: of the images; a field `column.bytes` within a struct.
        groups: file, row group and row within it of each picture: int64 (N, 3).
        names, labels, classes: as in ImageSet.
    """

    places_in = "groups"

    def __init__(
        self,
        decoding: Decoding,
        files: Sequence[Path],
        column: str,
        groups: np.ndarray,
        names: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str],
    ) -> None:
        super().__init__(decoding, names, labels, classes)
        self.files, self.column, self.groups = list(files), column, groups
        self._kept: tuple[tuple[int, int], Any] | None = None

    def open(self, number: int) -> IO[bytes]:
        file, group, row = self.groups[number].tolist()
        if self._kept is None or self._kept[0] != (file, group):
            self._kept = (file, group), _read_group(self.files[file], group, self.column)
        try:
            value = self._kept[1][row].as_py()
        except _damage() as error:
            raise OSError(in_words(error)[:200]) from None
        if not isinstance(value, bytes):
            raise OSError("the row has no image")
        return io.BytesIO(value)

    def fingerprint(self) -> str:
        return digest(["parquet", iter(self.names), self.column, [size_and_date(path) for path in self.files]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def open_parquet(location: str, options: OpenOptions) -> ImageSet:
    """The images of Parquet files: a file, a folder, a pattern or a range, and names of columns after `?`.

    `parquet:data/*.parquet?image=img&label=y&caption=text`. Without names the usual ones are looked for. Images are
    encoded (JPEG, PNG, ...) bytes, or structs with such a field `bytes` as the `datasets` library writes them, whose
    class names are found too.

    Raises:
        NoSplit: a split is asked for; files of splits are given one by one.
        UsageError: a file is damaged, has no column of images, or pyarrow is missing.
    """
    pq = _pyarrow()
    path, _, query = location.partition("?")
    if options.split is not None:
        raise NoSplit(f"{path} has no split {options.split!r}; give its files alone")
    kinds = {"image": IMAGE, "label": LABEL, "caption": CAPTION, "name": NAME}
    wanted = parse_query(f"parquet:{path}", query, [*kinds])
    files = expand(path, ".parquet")
    found: dict[str, str | None] = {}
    classes: list[str] = []
    groups, columns = [], {"label": [], "caption": [], "name": []}  # type: ignore[var-annotated]
    for number, file in enumerate(files):
        try:
            with open_regular(file) as handle:
                table = pq.ParquetFile(handle)
                schema = table.schema_arrow
                if number == 0:
                    found = {kind: find_column(file, schema.names, wanted, kind, kinds[kind]) for kind in kinds}
                    classes = _classes(schema, found["label"])
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    groups.append(np.stack([np.full(rows, number), np.full(rows, group), np.arange(rows)], 1))
                for kind, values in columns.items():
                    if found[kind]:
                        values += table.read([found[kind]]).column(0).to_pylist()
        except _damage() as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{file} cannot be read as Parquet: {in_words(error)[:200]}") from None
    places = np.concatenate(groups) if groups else np.empty((0, 3), np.int64)
    if not len(places):
        raise UsageError(f"there are no rows in {path}")
    names = [str(value) for value in columns["name"]]
    if len(set(names)) < len(places):
        names = numbered(len(places))
    labels, classes = _labels(path, columns["label"], classes)
    images = ParquetImages(options.decoding, files, str(found["image"]), places, names, labels, classes)
    if found["caption"] and all(isinstance(text, str) for text in columns["caption"]):
        images.captions = columns["caption"]
    return images


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'lexel[tokens]'") from None
    return pq


def _damage() -> tuple[type[Exception], ...]:
    """Errors of pyarrow on damaged files: its own, many of them of Python's kinds too, and some of these."""
    import pyarrow as pa

    own: type[Exception] = pa.ArrowException
    return own, OSError, ValueError, TypeError, LookupError, OverflowError, NotImplementedError, MemoryError


def _read_group(path: Path, group: int, column: str) -> Any:
    """The images of a row group.

    Raises:
        OSError: it is damaged, or no longer there.
    """
    try:
        with open_regular(path) as handle:
            values = _pyarrow().ParquetFile(handle).read_row_group(group, [column]).column(0).combine_chunks()
        return values.field("bytes") if hasattr(values, "field") else values
    except _damage() as error:
        raise OSError(f"{path} is damaged: {in_words(error)[:200]}") from None


def _classes(schema: Any, label: str | None) -> list[str]:
    """The names of classes that the `datasets` library keeps in a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _labels(path: str, values: list[Any], classes: list[str]) -> tuple[list[int] | None, list[str]]:
    if not values:
        return None, []
    if all(isinstance(value, str) for value in values):
        return class_numbers(values)
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6 for value in values):
        raise UsageError(f"{path}: labels must be class numbers from 0, or names, for every image")
    most = max(values)
    if classes and most >= len(classes):
        raise UsageError(f"{path} has the label {most} for {len(classes)} classes")
    return values, classes or [str(number) for number in range(most + 1)]
