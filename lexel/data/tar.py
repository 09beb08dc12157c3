"""Image sets in tar shards, as WebDataset writes them, read by number through an index.

The files of a sample share their name up to the first dot: `0001.jpg`, `0001.cls` (a class number), `0001.json`
(`label` and `caption`), `0001.txt` (the caption). The index (member, offset, size) of every shard is made once and
kept in the cache folder, so that a batch stays a function of (seed, step) and no stream has to be wound forward.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from warnings import catch_warnings, simplefilter, warn

import numpy as np

from lexel.arrays import open_arrays
from lexel.checkpoint import atomic
from lexel.data.digests import digest, rows, size_and_date
from lexel.data.files import EXTENSIONS, Decoding, in_words
from lexel.data.folder import part_of_names
from lexel.data.images import EncodedImages, ImageSet
from lexel.data.index_file import find, index_path, map_index, source_of
from lexel.data.names import Names
from lexel.data.options import OpenOptions
from lexel.data.remote import Location, Version, open_location, read_range, stem, version
from lexel.data.shard_locations import expand_locations
from lexel.errors import UsageError
from lexel.regular import open_regular
from lexel.runtime import cache_folder, is_cached

VERSION = 2  # of the index
NO_LABEL = -1
MOST_TEXT = 2**20  # bytes of a .json, .txt or .cls that are read


@dataclass(frozen=True)
class ShardIndex:
    """The index of a shard: names, offsets and sizes of its images.

    Attributes:
        names: of the members.
        offsets, sizes: int64 (N,), bytes in the shard.
        labels: int64 (N,), NO_LABEL where there is none.
        captions: one a member, empty where there is none.
        damage: why the shard could not be read to its end, or empty.
    """

    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    captions: Names
    damage: str = ""


class TarImages(EncodedImages):
    """Pictures in tar shards.

    Args:
        decoding: how bytes become arrays.
        shards: paths of the shards, or their locations elsewhere.
        found: size and date of each when it was indexed, or its server's name for this content.
        places: shard number, offset and size of each picture: int64 (N, 3).
        names, labels, classes: as in ImageSet.
    """

    places_in = "places"

    def __init__(
        self,
        decoding: Decoding,
        shards: Sequence[Location],
        found: Sequence[Version | None],
        places: np.ndarray,
        names: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str],
    ) -> None:
        super().__init__(decoding, names, labels, classes)
        self.shards, self.found, self.places = list(shards), list(found), places

    def open(self, number: int) -> IO[bytes]:
        shard, offset, size = self.places[number].tolist()
        place = self.shards[shard]
        if isinstance(place, str):
            return io.BytesIO(read_range(place, offset, size, self.found[shard]))
        if size_and_date(place) != self.found[shard]:
            raise OSError(f"{place} was changed after it was opened")
        with open_regular(place) as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def fingerprint(self) -> str:
        return digest(["tar", iter(self.names), rows(self.places[:, 1:]), self.found])


def open_tar(location: str, options: OpenOptions) -> ImageSet:
    """The images of tar shards: a file, a folder of .tar files, a pattern (`*`), or a range (`{0000..0099}`).

    Shards may lie elsewhere, https://... or any store that fsspec knows; images are read by ranges of bytes.

    Labels are the samples' `.cls` files or `label`s in `.json`; without those, the members' folders are splits and
    classes as the folders of a disk are. Captions are `.txt` files, or `caption` or `text` in `.json`.

    Raises:
        NoSplit: the members' folders have no such split.
        UsageError: there is no such shard, or no image in any.
    """
    shards = expand_locations(location, ".tar")
    versions = shard_versions(shards)
    source = source_of("tar", location, options.split)
    content = [VERSION, [[_spelled(path), found] for path, found in zip(shards, versions, strict=True)]]
    kept = find(index_path(source, content))
    if kept is not None:  # of a large set whose shards are the same
        columns, classes = kept.columns, kept.facts["classes"]
        images = TarImages(options.decoding, shards, versions, np.empty((0, 3), np.int64), [], None, classes)
        images.hold_index(columns)
        images.source = source
        return images
    with catch_warnings(record=True) as told:
        simplefilter("always")
        images = _open_shards(location, shards, versions, options)
    for one in told:
        warn(one.message, stacklevel=3)
    if not told:
        map_index(images, source, content)
    return images


def _open_shards(
    location: str, shards: Sequence[Location], versions: Sequence[Version | None], options: OpenOptions
) -> TarImages:
    """The images of shards by the index of each."""
    indexes = index_shards(shards, versions, options)
    left_out = {str(path): index.damage for path, index in zip(shards, indexes, strict=True) if index.damage}
    if left_out:
        first, why = next(iter(left_out.items()))
        if len(left_out) > options.max_unreadable * len(shards):
            raise UsageError(
                f"{len(left_out)} of {len(shards)} shards are damaged, more than max_unreadable = "
                f"{options.max_unreadable:g} allows; the first, {first}: {why}"
            )
        warn(f"{len(left_out)} of {len(shards)} shards are damaged and were read in part; {first}: {why}", stacklevel=3)
    names = Names.joined([index.names for index in indexes])
    if not names:
        raise UsageError(f"there are no images in {location} (looked for {', '.join(sorted(EXTENSIONS))})")
    if not names.distinct:  # keys that begin anew in every shard
        names = Names.joined(
            [Names(list(index.names), f"{stem(path)}/") for path, index in zip(shards, indexes, strict=True)]
        )
    places = np.concatenate(
        [
            np.stack([np.full(len(index.names), number), index.offsets, index.sizes], 1)
            for number, index in enumerate(indexes)
        ]
    )
    own = np.concatenate([index.labels for index in indexes])
    captions = Names.joined([index.captions for index in indexes])
    labels, classes = None, []
    chosen, labelled = np.arange(len(names)), own != NO_LABEL
    if options.split is not None or not labelled.any():
        part = part_of_names(location, names, options.split)
        chosen, names, labels, classes = np.array(part.numbers, np.int64), part.names, part.labels, part.classes
    elif not labelled.all():
        warn(
            f"{location}: no labels are used, since {(~labelled).sum():,} of {len(own):,} images have none",
            stacklevel=3,
        )
    if labelled[chosen].all() and len(chosen):
        labels, classes = own[chosen].tolist(), [str(number) for number in range(int(own.max()) + 1)]
    images = TarImages(options.decoding, shards, versions, places[chosen], names, labels, classes)
    if len(captions.letters):
        images.captions = captions.take(chosen)
    images.left_out = left_out
    return images


def shard_versions(shards: Sequence[Location]) -> list[Version | None]:
    """Size and date of every shard, or its server's name for its content.

    Raises:
        UsageError: one cannot be asked for.
    """
    with ThreadPoolExecutor(min(8, len(shards))) as pool:
        return list(pool.map(_version, shards))


def _version(path: Location) -> Version | None:
    try:
        return size_and_date(path) if isinstance(path, Path) else version(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {in_words(error)}") from None


def _spelled(path: Location) -> str:
    return str(path.resolve()) if isinstance(path, Path) else path


def index_shards(
    shards: Sequence[Location], versions: Sequence[Version | None], options: OpenOptions
) -> list[ShardIndex]:
    """The index of every shard: from the cache where size and date of the shard are the same, else made anew."""
    indexes: list[ShardIndex] = []
    with ThreadPoolExecutor(min(8, len(shards))) as pool:
        for index in pool.map(_indexed, shards, versions):
            indexes.append(index)
            if options.progress is not None:
                options.progress(len(indexes), len(shards))
    return indexes


def _indexed(path: Location, found: Version | None) -> ShardIndex:
    key = digest(["tar", VERSION, _spelled(path), found])
    cached = cache_folder() / "indexes" / f"{key}.npz"
    if is_cached(cached):
        try:
            return _load(cached)
        except UsageError:
            pass  # a damaged index is made again
    index = index_shard(path)
    if not index.damage:
        try:
            _save(cached, index)
        except OSError as error:  # a cache that cannot be written costs time, and nothing else
            warn(f"the index of {path} cannot be kept: {in_words(error)}", stacklevel=2)
    return index


def index_shard(path: Location) -> ShardIndex:
    """Reads the headers of a shard. What comes before a damaged place is kept, and the damage said.

    Raises:
        UsageError: the file cannot be opened, or is compressed.
    """
    images: list[tuple[str, str, int, int]] = []  # key, name, offset, size
    labels: dict[str, int] = {}
    captions: dict[str, str] = {}
    damage = ""
    try:
        with open_location(path) as file:
            total = file.seek(0, io.SEEK_END)
            file.seek(0)
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                raise UsageError(f"{path} is compressed and cannot be read by number; unpack it (gunzip, unzstd)")
            file.seek(0)
            try:
                for member in _members(file):
                    key, ending = _sample(member.name)
                    if member.offset_data + member.size > total:
                        damage = f"it is cut short in {member.name}"
                        break
                    if f".{ending.rpartition('.')[2]}" in EXTENSIONS:
                        images.append((key, member.name, member.offset_data, member.size))
                    elif ending in ("cls", "json", "txt") and member.size <= MOST_TEXT:
                        file.seek(member.offset_data)  # the archive finds its own place again
                        _metadata(key, ending, file.read(member.size), labels, captions)
            except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
                damage = f"it is damaged after {len(images)} images ({in_words(error)})"
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {in_words(error)}") from None
    if not images and not damage and total % 512:
        damage = "it is no tar archive"
    keys = [key for key, *_ in images]
    return ShardIndex(
        Names([name for _, name, _, _ in images]),
        np.array([offset for *_, offset, _ in images], np.int64),
        np.array([size for *_, size in images], np.int64),
        np.array([labels.get(key, NO_LABEL) for key in keys], np.int64),
        Names([captions.get(key, "") for key in keys]),
        damage,
    )


class _Member(tarfile.TarInfo):
    """A member whose header is read in a third of tarfile's time where it is that of a plain file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        if len(buf) == 512 and buf[156] in b"0\0" and buf[345] == 0:  # a regular file, its name in one field
            name, size, stored = bytes(buf[:100]), bytes(buf[124:136]), bytes(buf[148:156])
            name = name[: name.find(b"\0") if b"\0" in name else 100]
            size, stored = size.rstrip(b"\0 "), stored.rstrip(b"\0 ")
            # 256: the checksum is made with its own eight bytes as spaces.
            if size.isdigit() and stored.isdigit() and max(size + stored) < ord("8") and not name.endswith(b"/"):
                member = cls(name.decode(encoding, errors))
                member.size, member.chksum = int(size, 8), int(stored, 8)
                if member.chksum == sum(buf) - sum(buf[148:156]) + 256:
                    return member
        return super().frombuf(buf, encoding, errors)


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The regular, visible files of an archive."""
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if (
                member.isreg()
                and not member.issparse()
                and not any(part.startswith(".") for part in _parts(member.name))
            ):
                member.name = member.name.removeprefix("./")
                yield member
        # Behind the first member a header that is no header ends the walk as zeros do; only zeros are the end.
        file.seek(archive.offset)
        if file.read(512).strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {archive.offset:,} is none")


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part != "."]


def _sample(name: str) -> tuple[str, str]:
    """The key of a member, all up to the first dot of the file's name, and its ending in lower case, all after it."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _metadata(key: str, ending: str, data: bytes, labels: dict[str, int], captions: dict[str, str]) -> None:
    """Takes label and caption of a sample out of one of its files; what is not understood is no label."""
    text = data.decode("utf-8", "replace").strip()
    if ending == "txt":
        captions[key] = text
    elif ending == "cls":
        if text.isdecimal() and len(text) < 7:
            labels[key] = int(text)
    else:
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(table, dict):
            return
        label = table.get("label", table.get("cls"))
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 10**6:
            labels.setdefault(key, label)
        caption = table.get("caption", table.get("text"))
        if isinstance(caption, str):
            captions.setdefault(key, caption)


def _save(path: Path, index: ShardIndex) -> None:
    arrays: dict[str, Any] = {"offsets": index.offsets, "sizes": index.sizes, "labels": index.labels}
    for what, texts in (("names", index.names), ("captions", index.captions)):
        data = b"\0".join(text.replace("\0", " ").encode("utf-8", "surrogatepass") for text in texts)
        arrays[what] = np.frombuffer(data, np.uint8)
    arrays["digest"] = np.frombuffer(_digest(arrays), np.uint8)
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _load(path: Path) -> ShardIndex:
    """A kept index, checked.

    Raises:
        UsageError: it is damaged.
    """
    with open_arrays(path) as file:
        arrays: dict[str, Any] = {name: file.read(name, "N", np.int64) for name in ("offsets", "sizes", "labels")}
        arrays |= {name: file.read(name, "N", np.uint8) for name in ("names", "captions")}
        if file.read("digest", "32", np.uint8).tobytes() != _digest(arrays):
            raise UsageError(f"{path} is damaged")
    count = len(arrays["offsets"])
    texts = {
        name: Names(arrays[name].tobytes().decode("utf-8", "surrogatepass").split("\0") if count else [])
        for name in ("names", "captions")
    }
    if len({len(arrays["sizes"]), len(arrays["labels"]), count, *(len(text) for text in texts.values())}) != 1:
        raise UsageError(f"{path} is damaged")
    return ShardIndex(texts["names"], arrays["offsets"], arrays["sizes"], arrays["labels"], texts["captions"])


def _digest(arrays: dict[str, Any]) -> bytes:
    hasher = hashlib.sha256()
    for name in ("offsets", "sizes", "labels", "names", "captions"):
        hasher.update(arrays[name].tobytes())
    return hasher.digest()
