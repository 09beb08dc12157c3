"""Sets of images: folders, single files, and the embedded ones, all behind the same few names."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lexel.data.files import EXTENSIONS, PIXEL_LIMIT, UnreadableImage, find_images, read_image
from lexel.errors import UsageError

# How a folder may call its parts; the first of each row is the name used here.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
SPLIT_NAMES = frozenset(name for names in SPLITS.values() for name in names)


class ImageSet:
    """Numbered pictures with names, and labels where there are any.

    Attributes:
        names: one per picture, unique.
        labels: the class number of each picture, or None.
        classes: the name of each class; empty without labels.
        attribution: what must be shown beside these pictures, or None.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
    ) -> None:
        self.names = list(names)
        self.labels = None if labels is None else list(labels)
        self.classes = list(classes)
        self.attribution = attribution

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> np.ndarray:
        """Picture `number`: uint8 (H, W, 3). Not to be written to.

        Raises:
            UnreadableImage: the picture is damaged.
        """
        raise NotImplementedError

    def subset(self, numbers: Sequence[int]) -> "ImageSet":
        """The pictures with these numbers, in this order."""
        return Subset(self, numbers)

    def hold_out(self, fraction: float) -> tuple["ImageSet", "ImageSet"]:
        """Two sets, the rest and the held-out part: at least one picture, chosen by the hashes of the names.

        At least one of the held-out pictures can be read, even if that takes a larger part.

        Raises:
            UsageError: fraction is not between 0 and 1, or there is nothing to spare.
        """
        order, count = hold_out_order(self.names, fraction)
        if not any(self._is_readable(number) for number in order[:count]):
            while count < len(order) - 1 and not self._is_readable(order[count]):
                count += 1
            count = min(count + 1, len(order) - 1)
        return self.subset(sorted(order[count:])), self.subset(sorted(order[:count]))

    def _is_readable(self, number: int) -> bool:
        try:
            self.read(number)
        except UnreadableImage:
            return False
        return True


def hold_out_order(names: Sequence[str], fraction: float) -> tuple[list[int], int]:
    """Numbers of named things in the order of the hashes of the names, and how many of the first to hold out."""
    if not 0 < fraction < 1:
        raise UsageError(f"the part to hold out must lie between 0 and 1, got {fraction}")
    if len(names) < 2:
        raise UsageError(f"holding out a part needs at least 2 images, and there is {len(names)}")
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    return sorted(range(len(names)), key=digests.__getitem__), count


class FileImages(ImageSet):
    """Pictures in files, decoded when read.

    Args:
        folder: what the files are relative to.
        names, labels, classes, attribution: as in ImageSet.
        files: the paths of the pictures; by default their names are their paths.
        pixel_limit: pictures with more pixels than this are unreadable.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
        files: Sequence[str] | None = None,
        pixel_limit: int = PIXEL_LIMIT,
    ) -> None:
        super().__init__(names, labels, classes, attribution)
        self.folder = folder
        self.files = self.names if files is None else list(files)
        self.pixel_limit = pixel_limit

    def read(self, number: int) -> np.ndarray:
        return read_image(self.folder / self.files[number], self.names[number], self.pixel_limit)


class ArrayImages(ImageSet):
    """Pictures in one uint8 array (N, H, W, 3), which may be an .npy file mapped into memory.

    Args:
        array: the pictures.
        names, labels, classes, attribution: as in ImageSet.
    """

    def __init__(
        self,
        array: np.ndarray,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
    ) -> None:
        super().__init__(names, labels, classes, attribution)
        self.array = array

    def read(self, number: int) -> np.ndarray:
        return np.asarray(self.array[number])

    def __getstate__(self) -> dict[str, Any]:  # a mapped file goes to another process as its path, not as a copy
        mapped = self.array.filename if isinstance(self.array, np.memmap) else None
        return self.__dict__ if mapped is None else {**self.__dict__, "array": Path(mapped)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.array, Path):
            self.array = np.load(self.array, mmap_mode="r")


class Subset(ImageSet):
    """Some pictures of another set."""

    def __init__(self, images: ImageSet, numbers: Sequence[int]) -> None:
        labels = None if images.labels is None else [images.labels[number] for number in numbers]
        super().__init__([images.names[number] for number in numbers], labels, images.classes, images.attribution)
        self.images = images
        self.numbers = list(numbers)

    def read(self, number: int) -> np.ndarray:
        return self.images.read(self.numbers[number])


class Remembered(ImageSet):
    """Another set, whose pictures are kept in memory once they were read, up to a limit.

    Args:
        images: the set.
        limit: bytes to keep at most; pictures read after it is full are decoded every time.
    """

    def __init__(self, images: ImageSet, limit: int) -> None:
        super().__init__(images.names, images.labels, images.classes, images.attribution)
        self.images = images
        self._room = limit
        self._kept: dict[int, np.ndarray] = {}

    def read(self, number: int) -> np.ndarray:
        picture = self._kept.get(number)
        if picture is None:
            picture = self.images.read(number)
            if picture.nbytes <= self._room:
                self._room -= picture.nbytes
                self._kept[number] = picture
        return picture


def open_images(
    source: str | Path,
    split: str | None = None,
    size: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    pixel_limit: int = PIXEL_LIMIT,
) -> ImageSet:
    """The pictures of a folder, a file, or an embedded set.

    A folder may hold its pictures in any nesting. Where all of them lie in subfolders, the first level names their
    classes, numbered in sorted order. Hidden files are left out, and files that are no pictures.

    Args:
        source: a path, or the name of an embedded set: `openmoji`, `openmoji-subcategories`, `photos`,
            `photo-crops`.
        split: "train", "validation" or "test". A folder has the splits it has subfolders for (train; validation, val
            or valid; test); openmoji and photo-crops have train and validation. None takes everything.
        size: pixels a side at which drawings are rendered (default 64); pictures in files keep their own size.
        progress: called with (done, total) while drawings are rendered for the first time.
        pixel_limit: pictures with more pixels than this are unreadable.

    Raises:
        UsageError: there is no such thing, no picture in it, no such split, or a package is missing.
    """
    from lexel.data.embedded import EMBEDDED  # here, since the embedded sets stand on the classes above

    if split is not None and split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if isinstance(source, str) and source in EMBEDDED:
        return EMBEDDED[source](split, size, progress)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, split, pixel_limit)
    if not path.exists():
        embedded = ", ".join(sorted(EMBEDDED))
        raise UsageError(f"there is no file or folder {str(source)!r}; give a path, or an embedded set: {embedded}")
    if path.suffix.lower() not in EXTENSIONS:
        raise UsageError(f"{path} is no image; give a folder or one of {', '.join(sorted(EXTENSIONS))}")
    if split is not None:
        raise UsageError(f"{path} is a single file and has no split {split!r}")
    return FileImages(path.parent, [path.name], pixel_limit=pixel_limit)


def split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder that holds a split, or None."""
    return next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)


def _open_folder(folder: Path, split: str | None, pixel_limit: int) -> ImageSet:
    if split is not None:
        part = split_folder(folder, split)
        if part is None:
            raise UsageError(
                f"{folder} has no split {split!r}: it has no subfolder called {' or '.join(SPLITS[split])}"
            )
        folder = part
    names = find_images(folder)
    if not names:
        raise UsageError(f"there are no images in {folder} (looked for {', '.join(sorted(EXTENSIONS))})")
    # The folder that names a picture's class: the first level below the folder, or below train/ and val/ in it.
    parents = [name.split("/")[:-1] for name in names]
    if all(len(parent) > 0 and parent[0] in SPLIT_NAMES for parent in parents):
        parents = [parent[1:] for parent in parents]
    if not all(parents):  # a picture outside all subfolders: these are no classes
        return FileImages(folder, names, pixel_limit=pixel_limit)
    classes = sorted({parent[0] for parent in parents})
    numbers = {name: number for number, name in enumerate(classes)}
    return FileImages(folder, names, [numbers[parent[0]] for parent in parents], classes, pixel_limit=pixel_limit)
