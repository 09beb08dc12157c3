"""Image sets of the `datasets` library: a name on its hub, or a folder that `save_to_disk` wrote."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl

from lexel.data.files import Decoding, in_words
from lexel.data.folder import SPLITS, NoSplit
from lexel.data.images import EncodedImages, ImageSet, digest
from lexel.data.options import OpenOptions
from lexel.data.parquet import CAPTION, LABEL
from lexel.errors import UsageError
from lexel.regular import expanded

IMAGE = ("image", "img", "jpg", "png")


class HubImages(EncodedImages):
    """Pictures of a map-style `datasets.Dataset`, decoded as files are.

    Args:
        decoding: how bytes become arrays.
        table: the data set, its image column set not to decode.
        column: of the images.
        names, labels, classes: as in ImageSet.
    """

    def __init__(
        self,
        decoding: Decoding,
        table: Any,
        column: str,
        names: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str],
    ) -> None:
        super().__init__(decoding, names, labels, classes)
        self.table, self.column = table, column

    def open(self, number: int) -> IO[bytes]:
        value = self.table[number][self.column]
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if value.get("path"):
            return Path(value["path"]).open("rb")
        raise OSError("the row has no image")

    def fingerprint(self) -> str:
        return digest(["datasets", self.table._fingerprint, len(self), self.column])


def open_datasets(location: str, options: OpenOptions) -> ImageSet:
    """A data set of the `datasets` library: `datasets:NAME?config=C&split=train&image=img&label=y&caption=text`.

    NAME is a folder that `save_to_disk` wrote, or what `load_dataset` takes. Only map-style data sets: a stream has no
    pictures by number, and a run could not go on in the middle of it.

    Raises:
        NoSplit: the data set has no such split.
        UsageError: it cannot be loaded, has no column of images, or the library is missing.
    """
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("this source needs the datasets library: pip install datasets") from None
    name, _, query = location.partition("?")
    wanted = dict(parse_qsl(query))
    try:
        if expanded(name).is_dir() and list(expanded(name).glob("**/dataset_info.json")):
            found = datasets.load_from_disk(str(expanded(name)))
        else:
            found = datasets.load_dataset(name, wanted.get("config"))
    except Exception as error:  # noqa: BLE001 - the library and the scripts it runs raise what they like
        raise UsageError(f"datasets cannot load {name!r}: {in_words(error)[:300]}") from None
    if isinstance(found, dict):
        found = _split(name, found, options.split, wanted.get("split"))
    elif options.split is not None:
        raise NoSplit(f"{name} has no split {options.split!r}: it is a single table")
    columns = found.column_names
    column = wanted.get("image") or next((one for one in IMAGE if one in columns), None)
    if column is None or column not in columns:
        raise UsageError(f"{name} has no column of images; its columns are {', '.join(columns)}: add ?image=COLUMN")
    label = wanted.get("label") or next((one for one in LABEL if one in columns), None)
    caption = wanted.get("caption") or next((one for one in CAPTION if one in columns), None)
    classes = list(getattr(found.features[label], "names", None) or []) if label else []
    labels = list(found[label]) if label else None
    if labels is not None:
        if not all(isinstance(value, int) and value >= 0 for value in labels):
            raise UsageError(f"{name}: the column {label!r} must hold class numbers from 0 for every image")
        classes = classes or [str(number) for number in range(max(labels, default=-1) + 1)]
    digits = len(str(max(len(found) - 1, 0)))
    names = [f"{number:0{digits}d}" for number in range(len(found))]
    table = found.cast_column(column, datasets.Image(decode=False))
    images = HubImages(options.decoding, table, column, names, labels, classes)
    if caption:
        images.captions = list(found[caption])
    return images


def _split(name: str, parts: dict[str, Any], split: str | None, wanted: str | None) -> Any:
    """The table of a split; the training part where none is asked for."""
    choices = [wanted] if wanted else list(SPLITS[split or "train"])
    for choice in choices:
        if choice in parts:
            return parts[choice]
    raise NoSplit(f"{name} has no split {wanted or split or 'train'!r}; its splits are {', '.join(parts)}")
