"""Which columns of a table of the `datasets` library hold images, labels and captions."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from lexel.data.files import Decoding
from lexel.data.images import EncodedImages
from lexel.data.remote import is_remote, open_location
from lexel.errors import UsageError

IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL = ("label", "labels", "cls", "class", "fine_label")
CAPTION = ("caption", "text", "txt", "prompt")


def find_column(
    name: str | Path, columns: Sequence[str], wanted: Mapping[str, str], kind: str, usual: Sequence[str]
) -> str | None:
    """The column of a kind that is asked for, or the first with a usual name; None where it may be missing.

    Raises:
        UsageError: there is none of the name that is asked for, or none of images.
    """
    column = wanted.get(kind) or next((one for one in usual if one in columns), None)
    if column not in columns and (column or kind == "image"):
        what = f"no column {column!r}" if column else f"no column of images ({', '.join(usual)})"
        raise UsageError(f"{name} has {what}; its columns are {', '.join(columns)}: add ?{kind}=COLUMN")
    return column


class Columns(NamedTuple):
    """Names of columns.

    Attributes:
        image: of the images.
        label, caption: of class numbers and texts, where there are any.
    """

    image: str
    label: str | None
    caption: str | None

    @classmethod
    def find(cls, name: str, columns: Sequence[str], wanted: Mapping[str, str]) -> Self:
        """The columns that are asked for (`image`, `label`, `caption`), or those with the usual names.

        Raises:
            UsageError: there is no column of images, or none of a name that is asked for.
        """
        kinds = (("image", IMAGE), ("label", LABEL), ("caption", CAPTION))
        image, label, caption = (find_column(name, columns, wanted, kind, usual) for kind, usual in kinds)
        assert image is not None
        return cls(image, label, caption)

    def labels(
        self, name: str, features: Mapping[str, Any] | None, values: Iterable[Any]
    ) -> tuple[list[int] | None, list[str]]:
        """The labels of all images and the names of the classes; None without a column of them.

        Raises:
            UsageError: a label is no class number.
        """
        if self.label is None:
            return None, []
        labels = list(values)
        if not all(isinstance(value, int) and value >= 0 for value in labels):
            raise UsageError(f"{name}: the column {self.label!r} must hold class numbers from 0 for every image")
        named = getattr((features or {}).get(self.label), "names", None)
        return labels, list(named or map(str, range(max(labels, default=-1) + 1)))

    def captions(self, name: str, values: Iterable[Any], wanted: Mapping[str, str]) -> list[str] | None:
        """The captions of all images; None without a column of them, or if one with a usual name holds no texts.

        Raises:
            UsageError: the column that is asked for holds no texts.
        """
        captions = list(values)
        if self.caption is None:
            return None
        if all(isinstance(text, str) for text in captions):
            return captions
        if "caption" in wanted:
            raise UsageError(f"{name}: the column {self.caption!r} must hold a text for every image")
        return None


class TableImages(EncodedImages):
    """Pictures of the rows of a table of the `datasets` library, decoded as files are; base of sets and streams.

    Args:
        decoding: how bytes become arrays.
        rows: by number; the image column is not decoded.
        column: of the images.
        names, labels, classes: as in ImageSet.
    """

    def __init__(
        self,
        decoding: Decoding,
        rows: Any,
        column: str,
        names: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str],
    ) -> None:
        super().__init__(decoding, names, labels, classes)
        self.rows, self.column = rows, column

    def open(self, number: int) -> IO[bytes]:
        return encoded_image(self.rows[number][self.column])


def encoded_image(value: Any) -> IO[bytes]:
    """The encoded image of a row, as `datasets.Image(decode=False)` gives it.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    content, path = (None, None) if value is None else (value.get("bytes"), value.get("path"))
    if content is not None:
        return io.BytesIO(content)
    if path:
        return open_location(path if is_remote(path) else Path(path))
    raise OSError("the row has no image")
