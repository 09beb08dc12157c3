"""Image sets of the `datasets` library: a name on its hub, or a folder that `save_to_disk` wrote."""

from typing import Any

from lexel.data.columns import Columns, TableImages
from lexel.data.files import in_words
from lexel.data.folder import SPLITS, NoSplit
from lexel.data.images import ImageSet, digest
from lexel.data.names import numbered
from lexel.data.options import OpenOptions, parse_query
from lexel.data.shard_locations import expand_locations
from lexel.data.stream import open_stream
from lexel.errors import UsageError
from lexel.regular import expanded

KEYS = ("config", "revision", "files", "split", "image", "label", "caption", "streaming", "count", "window")


class HubImages(TableImages):
    """Pictures of a map-style `datasets.Dataset`."""

    def fingerprint(self) -> str:
        return digest(["datasets", self.rows._fingerprint, len(self), self.column])


def open_datasets(location: str, options: OpenOptions) -> ImageSet:
    """A data set of the `datasets` library: `datasets:NAME?config=C&split=train&image=img&label=y&caption=text`.

    NAME is a folder that `save_to_disk` wrote, or what `load_dataset` takes; of a kind of files (`parquet`,
    `webdataset`), `files=https://host/{00..12}.parquet` says which. With `streaming=true` nothing is downloaded first:
    see `open_stream`.

    Raises:
        NoSplit: the data set has no such split.
        UsageError: it cannot be loaded, has no column of images, a key is unknown, or the library is missing.
    """
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("this source needs the datasets library: pip install datasets") from None
    name, _, query = location.partition("?")
    wanted = parse_query(f"datasets:{name}", query, KEYS)
    streaming = wanted.pop("streaming", "false")
    if streaming not in ("true", "false"):
        raise UsageError(f"streaming must be true or false, got {streaming!r}")
    for key in ("count", "window"):
        if key in wanted and streaming == "false":
            raise UsageError(f"{key} is of streams, and this is none; add streaming=true, or leave it out")
    here = expanded(name).is_dir() and bool(list(expanded(name).glob("**/dataset_info.json")))
    if here and streaming == "true":
        raise UsageError(f"{name} lies on this disk and is read by number; leave streaming out")
    try:
        if here:
            found = datasets.load_from_disk(str(expanded(name)))
        else:
            version: dict[str, Any] = {"revision": wanted["revision"]} if "revision" in wanted else {}
            if "files" in wanted:
                version["data_files"] = [str(place) for place in expand_locations(wanted["files"], "")]
            found = datasets.load_dataset(name, wanted.get("config"), streaming=streaming == "true", **version)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - the library and the scripts it runs raise what they like
        raise UsageError(f"datasets cannot load {name!r}: {in_words(error)[:300]}") from None
    if isinstance(found, dict):
        found = _split(name, found, options.split, wanted.get("split"))
    elif options.split is not None:
        raise NoSplit(f"{name} has no split {options.split!r}: it is a single table")
    undecoded = datasets.Image(decode=False)
    if streaming == "true":
        return open_stream(found, name, wanted, options, undecoded)
    columns = Columns.find(name, found.column_names, wanted)
    labels, classes = columns.labels(name, found.features, found[columns.label] if columns.label else ())
    table = found.cast_column(columns.image, undecoded)
    images = HubImages(options.decoding, table, columns.image, numbered(len(found)), labels, classes)
    images.captions = columns.captions(name, found[columns.caption] if columns.caption else (), wanted)
    return images


def _split(name: str, parts: dict[str, Any], split: str | None, wanted: str | None) -> Any:
    """The table of a split; the training part where none is asked for."""
    choices = [wanted] if wanted else list(SPLITS[split or "train"])
    for choice in choices:
        if choice in parts:
            return parts[choice]
    raise NoSplit(f"{name} has no split {wanted or split or 'train'!r}; its splits are {', '.join(parts)}")
