"""Sources of images by name: the table, and the function that opens any of them.

A source is written `kind:location` (`tar:shards/{0000..0099}.tar`); a path alone is a folder or a file, and the name of
an embedded set alone is that set. A source is one function and one line of SOURCES; other packages add theirs through
the entry points `lexel.sources`.
"""

from collections.abc import Callable
from pathlib import Path

from lexel.data import embedded
from lexel.data.array_files import open_idx, open_npz
from lexel.data.files import EXTENSIONS, PIXEL_LIMIT
from lexel.data.folder import SPLITS, NoSplit, open_folder
from lexel.data.hub import open_datasets
from lexel.data.images import FileImages, ImageSet
from lexel.data.index_file import map_index, source_of
from lexel.data.lists import open_list
from lexel.data.mixture import Mixture, parse_mixture
from lexel.data.options import OpenOptions
from lexel.data.parquet import open_parquet
from lexel.data.tar import open_tar
from lexel.errors import UsageError
from lexel.registry import lookup
from lexel.regular import expanded
from lexel.runtime import ProgressCallback

Opener = Callable[[str, OpenOptions], ImageSet]
"""A location and options to a set; raises NoSplit where the source has no such split, UsageError for anything else."""


# Files that hold many images: which source reads them.
ENDINGS = {".npz": "npz", ".npy": "npz", ".tar": "tar", ".parquet": "parquet", ".csv": "list", ".tsv": "list"}


def _folder(location: str, options: OpenOptions) -> ImageSet:
    """The images of a folder, in any nesting; where all lie in subfolders, the first level names their classes."""
    path = expanded(location)
    if not path.is_dir():
        raise UsageError(f"{location} is no folder; give a folder of images")
    return open_folder(path, options)


def _file(location: str, options: OpenOptions) -> ImageSet:
    """A single image."""
    path = expanded(location)
    if not path.exists():
        raise UsageError(f"there is no file {location!r}; give the path of an image")
    kind = ENDINGS.get(path.suffix.lower())
    if kind is not None:
        raise UsageError(f"{path} is no image; write {kind}:{location} for the images in it")
    if path.suffix.lower() not in EXTENSIONS:
        raise UsageError(f"{path} is no image; give a folder or one of {', '.join(sorted(EXTENSIONS))}")
    if options.split is not None:
        raise NoSplit(f"{path} is a single file and has no split {options.split!r}")
    return FileImages(path.parent, [path.name], decoding=options.decoding)


def _mixture(location: str, options: OpenOptions) -> ImageSet:
    """Several sources, each as often as its weight says: `mixture:0.7*folder:photos + 0.3*openmoji`."""
    parts = parse_mixture(location)
    return Mixture([_opened(part.source, options) for part in parts], [part.weight for part in parts])


SOURCES: dict[str, Opener] = {
    "folder": _folder,
    "file": _file,
    "npz": open_npz,
    "idx": open_idx,
    "tar": open_tar,
    "parquet": open_parquet,
    "datasets": open_datasets,
    "list": open_list,
    "mixture": _mixture,
    "openmoji": embedded.openmoji,
    "openmoji-subcategories": embedded.openmoji_subcategories,
    "photos": embedded.photos,
    "photo-crops": embedded.photo_crops,
}
EMBEDDED = ("openmoji", "openmoji-subcategories", "photos", "photo-crops")  # need no location


def open_images(
    source: str | Path,
    split: str | None = None,
    size: int | None = None,
    *,
    channels: int = 3,
    depth: int = 8,
    progress: ProgressCallback | None = None,
    pixel_limit: int = PIXEL_LIMIT,
    max_unreadable: float = 1.0,
) -> ImageSet:
    """The pictures of a folder, a file, an embedded set, or any other entry of SOURCES.

    A folder may hold its pictures in any nesting. Where all of them lie in subfolders, the first level names their
    classes, numbered in sorted order. Hidden files are left out, and files that are no pictures.

    Args:
        source: a path, the name of an embedded set (`openmoji`, `openmoji-subcategories`, `photos`, `photo-crops`), or
            `kind:location` with a kind of SOURCES.
        split: "train", "validation" or "test". A folder has the splits it has subfolders for (train; validation, val
            or valid; test); openmoji and photo-crops have train and validation. None takes everything.
        size: pixels a side at which drawings are rendered (default 64); pictures in files keep their own size.
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha; more where a source has them.
        depth: bits a channel: 8 (uint8) or 16 (uint16).
        progress: called with (done, total) while drawings are rendered or shards indexed for the first time.
        pixel_limit: pictures with more pixels than this are unreadable.
        max_unreadable: the part of the shards of a source that may be damaged before that is an error.

    Raises:
        NoSplit: the source has no such split (a UsageError).
        UsageError: there is no such thing, no picture in it, or a package is missing.
    """
    if split is not None and split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if channels < 1 or depth not in (8, 16):
        raise UsageError(f"images have 1 or more channels of 8 or 16 bits, got {channels} of {depth}")
    return _opened(source, OpenOptions(split, size, channels, depth, pixel_limit, progress, max_unreadable))


def _opened(source: str | Path, options: OpenOptions) -> ImageSet:
    kind, location = parse_source(source)
    images: ImageSet = lookup(SOURCES, kind, "source", "lexel.sources")(location, options)
    if isinstance(images, ImageSet) and images.source is None:
        map_index(images, source_of(kind, location, options.split))
    return images


def parse_source(source: str | Path) -> tuple[str, str]:
    """The kind and the location that a source names.

    Raises:
        UsageError: there is no such path and no such kind.
    """
    if isinstance(source, str) and source in EMBEDDED:
        return source, ""
    path = expanded(source)
    if path.is_dir():
        return "folder", str(source)
    if path.exists():
        return "file", str(source)
    kind, colon, location = str(source).partition(":")
    if isinstance(source, Path) or not colon or "/" in kind:
        raise UsageError(
            f"there is no file or folder {str(source)!r}; give a path, or an embedded set: "
            f"{', '.join(sorted(EMBEDDED))}"
        )
    return kind, location
