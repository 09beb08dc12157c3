"""Image sets in arrays: .npz and .npy files, and the idx files of MNIST and Fashion-MNIST."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from lexel.arrays import open_arrays
from lexel.data.depth import CHANNELS
from lexel.data.folder import NoSplit
from lexel.data.images import ArrayImages, ImageSet
from lexel.data.names import numbered
from lexel.data.options import OpenOptions
from lexel.errors import UsageError
from lexel.regular import expanded, open_regular

IMAGES = ("images", "x", "data", "arr_0")  # names of arrays, the first that is there
LABELS = ("labels", "label", "y", "targets", "arr_1")
TEXTS = ("classes", "names", "captions")

UBYTE = 8  # idx's code for a type of one byte
PARTS = {"train": ("train",), "validation": ("validation", "val"), "test": ("t10k", "test")}


def open_npz(location: str, options: OpenOptions) -> ImageSet:
    """Images of a .npz or .npy file: uint8 or uint16 (N, H, W, C), or (N, H, W) for grey.

    The images are the array `images`, `x`, `data` or `arr_0`; integer `labels` (or `label`, `y`, `targets`, `arr_1`)
    and texts `classes`, `names` and `captions` are optional. Arrays that are not compressed are mapped into memory.

    Raises:
        NoSplit: a split is asked for; a file has none.
        UsageError: the file is damaged, or its arrays do not fit together.
    """
    path = expanded(location)
    if options.split is not None:
        raise NoSplit(f"{path} is a single file and has no split {options.split!r}")
    with open_arrays(path) as arrays:
        name = next((name for name in IMAGES if name in arrays), None)
        if name is None:
            raise UsageError(f"{path} has no array of images; name one of {', '.join(IMAGES)}")
        array = arrays.map(name, "N ...", np.unsignedinteger)
        label = next((label for label in LABELS if label in arrays and label != name), None)
        labels = None if label is None else arrays.read(label, f"{len(array)}", np.integer)
        texts = {text: arrays.read(text, "N", np.str_).tolist() for text in TEXTS if text in arrays}
    return array_images(str(path), array, labels, options, **texts)


def open_idx(location: str, options: OpenOptions) -> ImageSet:
    """Images of idx files, .gz or not: one file of images, or a folder in the layout of MNIST and Fashion-MNIST.

    A folder has `train-images-idx3-ubyte` and `t10k-images-idx3-ubyte` (the split `test`), each with the file of its
    labels beside it (`train-labels-idx1-ubyte`). None takes both parts, one after the other.

    Raises:
        NoSplit: there is no such part.
        UsageError: a file is missing or damaged.
    """
    path = expanded(location)
    if path.is_dir():
        parts = [options.split] if options.split else list(PARTS)
        found = [file for part in parts for file in _idx_files(path, part)]
        if not found and options.split:
            raise NoSplit(
                f"{path} has no split {options.split!r}: no {PARTS[options.split][0]}-images-idx3-ubyte in it"
            )
    else:
        found = [path]
        if options.split is not None:
            raise NoSplit(f"{path} is a single file and has no split {options.split!r}")
    if not found:
        raise UsageError(f"there are no idx files in {path} (looked for train-images-idx3-ubyte, with .gz or without)")
    arrays = [read_idx(file) for file in found]
    beside = [
        file.with_name(file.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1"))
        for file in found
    ]
    labelled = all(label != image and label.is_file() for label, image in zip(beside, found, strict=True))
    labels = np.concatenate([read_idx(file) for file in beside]) if labelled else None
    if len({array.shape[1:] for array in arrays}) > 1:
        raise UsageError(f"the idx files in {path} hold images of different sizes; give one of them")
    return array_images(str(path), np.concatenate(arrays), labels, options)


def array_images(
    source: str,
    array: np.ndarray,
    labels: np.ndarray | None,
    options: OpenOptions,
    classes: list[str] | None = None,
    names: list[str] | None = None,
    captions: list[str] | None = None,
) -> ArrayImages:
    """A set of an array (N, H, W) or (N, H, W, C), brought to the channels and bits that were asked for."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.dtype not in (np.uint8, np.uint16):
        raise UsageError(
            f"{source}: images must be uint8 or uint16 (N, H, W) or (N, H, W, C), got {array.dtype} {array.shape}"
        )
    given = array.shape[-1]
    if given != options.channels and not {given, options.channels} <= CHANNELS.keys():
        raise UsageError(f"{source} has images of {given} channels; set data.channels = {given}")
    if labels is not None:
        labels = labels.astype(np.int64)
        if labels.shape != (len(array),):
            raise UsageError(f"{source} has {labels.size} labels for {len(array)} images")
        most = int(labels.max(initial=-1))
        if classes is None:
            classes = [str(number) for number in range(most + 1)] if most < 10**6 else []
        if int(labels.min(initial=0)) < 0 or most >= len(classes):
            raise UsageError(f"{source} has labels from {labels.min()} to {most} for {len(classes)} classes")
    images = ArrayImages(
        array,
        _of_length(source, "names", names, len(array)) or numbered(len(array)),
        None if labels is None else labels.tolist(),
        (classes or []) if labels is not None else [],
        channels=options.channels,
        depth=options.depth,
    )
    images.captions = _of_length(source, "captions", captions, len(array))
    return images


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file of bytes, compressed by gzip or not: the header is checked before memory is taken.

    Raises:
        UsageError: the file is missing, damaged, or holds another type.
    """
    try:
        with open_regular(path) as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            file = gzip.GzipFile(fileobj=plain) if packed else plain
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
                raise UsageError(f"{path} is no idx file: it begins with {magic.hex() or 'nothing'}")
            if magic[2] != UBYTE:
                raise UsageError(f"{path} holds idx type {magic[2]:#x}; bytes ({UBYTE:#x}) are needed")
            header = file.read(4 * magic[3])
            shape = tuple(int.from_bytes(header[place : place + 4]) for place in range(0, len(header), 4))
            count = math.prod(shape)
            # gzip makes at most 1,032 bytes of one.
            most = path.stat().st_size * (1032 if packed else 1)
            if len(header) < 4 * magic[3] or count > most:
                raise UsageError(f"{path} is cut short: its header says {shape}")
            data = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) != count:
        raise UsageError(
            f"{path} is damaged: it has {'more' if len(data) > count else 'fewer'} bytes than {shape} need"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_files(folder: Path, part: str) -> list[Path]:
    """The file of a part's images in a folder, if there is one."""
    for prefix in PARTS[part]:
        for form in ("{}-images-idx3-ubyte", "{}-images.idx3-ubyte"):
            for ending in ("", ".gz"):
                path = folder / (form.format(prefix) + ending)
                if path.is_file():
                    return [path]
    return []


def _of_length(source: str, what: str, texts: list[str] | None, count: int) -> list[str] | None:
    if texts is not None and len(texts) != count:
        raise UsageError(f"{source} has {len(texts)} {what} for {count} images")
    return texts
