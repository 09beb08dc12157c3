"""Streams of the `datasets` library as image sets: numbered in the order of the stream, read forwards.

A stream has no images by number. Here it gets them: image n is the n-th of the stream, whoever asks, and reading it
reads the stream up to there. So everything that goes through a set in order reads the stream once, and a batch of
training stays a function of (seed, step), since training shuffles a stream only within windows of neighbours.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from warnings import warn

from lexel.data.columns import Columns, TableImages
from lexel.data.files import Decoding, in_words
from lexel.data.held_out import hold_out_order
from lexel.data.images import ImageSet, digest
from lexel.data.names import numbered
from lexel.data.options import OpenOptions, whole_number
from lexel.errors import UsageError

WINDOW = 1024  # neighbours that a training shuffles; two windows of encoded images are kept in memory
EVERY = 1000  # images between two calls of `progress`


@contextmanager
def told_of(name: str, number: int) -> Iterator[None]:
    """Tells in a line what the library raises while a stream is read from some image on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the library, its stores and its scripts raise what they like
        raise UsageError(f"the stream of {name} broke after image {number:,}: {in_words(error)[:300]}") from None


class Forwards:
    """The rows of a stream by number, read forwards; the rows read last are kept, and a jump back begins again.

    Args:
        stream: with `skip` and `iter` of a `datasets.IterableDataset`.
        name: of the data set, in errors.
        count: rows that it has.
        kept: rows at least that can still be asked for, below the furthest read.
    """

    def __init__(self, stream: Any, name: str, count: int, kept: int) -> None:
        self.stream, self.name, self.count, self.kept = stream, name, count, kept
        self._forget()

    def _forget(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}
        self._read: Iterator[dict[str, list[Any]]] | None = None
        self._next, self._process = 0, os.getpid()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The row of a number.

        Raises:
            UsageError: the stream broke, or has fewer rows than it had.
        """
        if self._process != os.getpid():  # connections cannot be shared with the process that we were forked from
            self._forget()
        row = self._rows.get(number)
        if row is not None:
            return row
        if self._read is None or number < self._next:
            self._forget()
            self._next = max(0, number - number % self.kept)
            # By `iter`, since iterating over a stream shares it between the workers of a loader.
            self._read = (self.stream.skip(self._next) if self._next else self.stream).iter(batch_size=1)
        while self._next <= number:
            self._rows[self._next] = self._following()
            self._rows.pop(self._next - 2 * self.kept, None)
            self._next += 1
        return self._rows[number]

    def _following(self) -> dict[str, Any]:
        assert self._read is not None
        reading, self._read = self._read, None  # one that has ended or broken is begun again
        with told_of(self.name, self._next):
            row = next(reading, None)
        if row is None:
            raise UsageError(f"the stream of {self.name} ended after {self._next:,} images of {self.count:,}")
        self._read = reading
        return {column: values[0] for column, values in row.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {}, "_read": None}


class StreamedImages(TableImages):
    """Pictures of a stream.

    Args:
        decoding: how bytes become arrays.
        rows: of the stream, with its column of images alone.
        column: of the images.
        window: neighbours that a training shuffles.
        identity: what says which stream it is.
        labels, classes: as in ImageSet.
    """

    def __init__(
        self,
        decoding: Decoding,
        rows: Forwards,
        column: str,
        window: int,
        identity: Mapping[str, str],
        labels: Sequence[int] | None,
        classes: Sequence[str],
    ) -> None:
        super().__init__(decoding, rows, column, numbered(rows.count), labels, classes)
        self.window, self.identity = window, dict(identity)

    def fingerprint(self) -> str:
        """Of the stream's name, its number of images, labels and captions: their pixels are not read for it."""
        captions = None if self.captions is None else list(self.captions)
        return digest(["stream", self.identity, len(self), self.column, self.labels, self.classes, captions])

    def hold_out(self, fraction: float) -> tuple[ImageSet, ImageSet]:
        """The rest, and the first images of the stream: chosen by their hashes, they would lie all over it."""
        _, count = hold_out_order(self.names, fraction)
        while not any(self._is_readable(number) for number in range(count)) and count < len(self) - 1:
            count += 1
        other = copy.copy(self)  # reads the stream by itself: measuring does not throw training back
        other.rows = copy.copy(self.rows)
        other.rows._forget()
        return self.subset(range(count, len(self))), other.subset(range(count))


def open_stream(
    stream: Any, name: str, wanted: Mapping[str, str], options: OpenOptions, undecoded: Any
) -> StreamedImages:
    """A stream as an image set.

    Its labels and captions are read at once, and its images counted if it does not say their number: a pass over the
    stream, of those columns alone. With `count` it has so many images, the first ones.

    Args:
        stream: a `datasets.IterableDataset`.
        name: of the data set.
        wanted: what the location asks for: columns, `count`, `window`, and what says which stream it is.
        options: of opening a source.
        undecoded: the type of a column of images that are not decoded.

    Raises:
        UsageError: `count` or `window` is no number above 0, or the stream has no column of images, no image, or
            cannot be read.
    """
    count, window = (whole_number(wanted, key) for key in ("count", "window"))
    names = stream.column_names
    if names is None:  # nobody said, so its first row does
        with told_of(name, 0):
            names = list(next(iter(stream.iter(batch_size=1)), {}))
    columns = Columns.find(name, names, wanted)
    table = stream.cast_column(columns.image, undecoded).select_columns([columns.image])
    facts = [column for column in (columns.label, columns.caption) if column]
    splits = getattr(stream.info, "splits", None) or {}
    told = getattr(splits.get(str(stream.split)), "num_examples", None) or None
    labels: list[Any] = []
    captions: list[Any] = []
    if facts or (count or told) is None:
        number = 0
        with told_of(name, 0):
            for row in (stream.select_columns(facts) if facts else table).iter(batch_size=1):
                if number == count:
                    break
                number += 1
                if columns.label:
                    labels.append(row[columns.label][0])
                if columns.caption:
                    captions.append(row[columns.caption][0])
                if options.progress is not None and number % EVERY == 0:
                    options.progress(number, max(number, count or told or 0))
        if count is not None and number < count:
            raise UsageError(f"the stream of {name} has {number:,} images, fewer than count={count}")
        count = number
    count = count or told or 0
    if count == 0:
        raise UsageError(f"the stream of {name} has no images")
    rows = Forwards(table, name, count, window or WINDOW)
    known, classes = columns.labels(name, stream.features, labels)
    identity = {key: value for key, value in wanted.items() if key != "window"}
    images = StreamedImages(
        options.decoding, rows, columns.image, rows.kept, {**identity, "name": name}, known, classes
    )
    images.captions = columns.captions(name, captions, wanted)
    warn(
        f"{name} is read as a stream: training shuffles it only within {rows.kept:,} neighbours, and every worker, "
        "process and part reads past what the others take, as a run does that goes on",
        stacklevel=2,
    )
    return images
