"""Sets of images: numbered, named, read one by one, whatever they lie in."""

import copy
import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lexel.data.depth import to_channels, to_depth
from lexel.data.digests import digest as digest
from lexel.data.digests import rows
from lexel.data.digests import size_and_date as size_and_date
from lexel.data.files import Decoding, UnreadableImage, decode_image, first_reason, in_words
from lexel.data.held_out import hold_out_order, renumbered
from lexel.data.index_file import Column, is_large, map_index
from lexel.data.names import ChosenNames, Labels, Names
from lexel.errors import UsageError
from lexel.regular import open_regular


class ImageSet:
    """Numbered pictures with names, and labels and captions where there are any.

    Attributes:
        names: one per picture, unique.
        labels: the class number of each picture, or None.
        classes: the name of each class; empty without labels.
        attribution: what must be shown beside these pictures, or None.
        captions: a text for each picture, or None.
        channels: of the arrays that `read` gives: 3 for RGB.
        depth: bits a channel: 8 (uint8) or 16 (uint16).
        window: neighbours that a training shuffles, of a set that is read forwards; None for all others.
        places_in: the attribute that says where each image lies, int64 (N, k); None where nothing of that size does.
        source: plain data that names where a large set comes from, whose index is mapped; None for others.
        left_out: what was found but does not belong to the set, and why: folders without rights, named pipes, damaged
            shards. Pictures that turn out to be unreadable are not in it.
    """

    channels: int = 3
    depth: int = 8
    captions: Sequence[str] | None = None
    window: int | None = None
    places_in: str | None = None
    source: Any = None

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
    ) -> None:
        self.names: Names = names if isinstance(names, Names) else Names(names)
        kept: dict[int, int] = {}  # one object for each class, however many pictures it has
        self.labels: Sequence[int] | None = labels
        if labels is not None and not isinstance(labels, Labels):
            self.labels = list(map(kept.setdefault, labels, labels))
        self.classes = list(classes)
        self.attribution = attribution
        self.left_out: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> np.ndarray:
        """Picture `number`: uint8 or uint16 (H, W, channels). Not to be written to.

        Raises:
            UnreadableImage: the picture is damaged.
        """
        raise NotImplementedError

    def first_readable(self, what: str = "images") -> np.ndarray:
        """The first picture that can be read.

        Args:
            what: the pictures are, for the error.

        Raises:
            UsageError: there is none; says why not the first.
        """
        unreadable = {}
        for number in range(len(self)):
            try:
                return self.read(number)
            except UnreadableImage as error:
                unreadable[error.name] = error.reason
        raise UsageError(f"none of the {len(self)} {what} can be read; {first_reason(unreadable)}")

    def fingerprint(self) -> str:
        """A SHA-256 that changes when a picture is changed, added, removed or renamed.

        Quick where that can be known without reading all pixels: files are known by their names, sizes and dates.
        """
        hasher = hashlib.sha256(json.dumps(list(self.names)).encode())
        for number in range(len(self)):
            try:
                hasher.update(np.ascontiguousarray(self.read(number)).data)
            except UnreadableImage as error:
                hasher.update(error.reason.encode())
        return hasher.hexdigest()

    def as_stored(self) -> "ImageSet":
        """The same pictures with their pixels as stored in their files: neither turned by EXIF nor laid on white.

        What published evaluations read. Sets that have no such choice are the same.
        """
        return self.decoded_with(stored=True)

    def decoded_with(self, **options: Any) -> "ImageSet":
        """The same pictures, their files decoded with other options of `Decoding`.

        Sets that decode no files are the same.
        """
        return self

    @property
    def decoded_on_gpu(self) -> bool:
        """Whether reading needs CUDA, which a process forked from one that uses it cannot have."""
        return False

    def subset(self, numbers: Sequence[int] | NDArray[np.int64]) -> "ImageSet":
        """The pictures with these numbers, in this order."""
        return Subset(self, numbers)

    def with_classes(self, classes: Sequence[str]) -> "ImageSet":
        """The same pictures, their labels numbered as in `classes`, by the names of the classes.

        Raises:
            UsageError: a picture has a class that is not among them, or there are no labels.
        """
        if self.labels is None:
            raise UsageError("the images have no classes")
        view = Wrapped(self, self.names, renumbered(self.labels, self.classes, classes))
        view.classes = list(classes)
        return view

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
        rest, held = self.subset(np.sort(order[count:])), self.subset(np.sort(order[:count]))
        for part in (rest, held):
            map_index(part, self.source and ["held out", fraction, part is held, self.source])
        return rest, held

    def index(self) -> dict[str, Column]:
        """What of a set grows with its number of images; see `map_index`."""
        columns: dict[str, Column] = {"names": self.names}
        if self.labels is not None:
            own = self.labels
            columns["labels"] = own.array if isinstance(own, Labels) else np.array(own, np.int32)
        if self.captions is not None:
            columns["captions"] = Names(self.captions)
        if self.places_in is not None:
            columns["places"] = getattr(self, self.places_in)
        return columns

    def hold_index(self, columns: Mapping[str, Column]) -> None:
        """Takes over columns as `index` gives them, which may be mapped now."""
        for name, column in columns.items():
            if name == "labels":
                assert isinstance(column, np.ndarray)
                self.labels = Labels(column)
            else:
                setattr(self, str(self.places_in) if name == "places" else name, column)

    def _is_readable(self, number: int) -> bool:
        try:
            self.read(int(number))
        except UnreadableImage:
            return False
        return True


class EncodedImages(ImageSet):
    """Pictures that lie encoded somewhere (JPEG, PNG, ...), decoded when read; base of the classes that say where.

    Args:
        decoding: how bytes become arrays.
        names, labels, classes, attribution: as in ImageSet.
    """

    def __init__(
        self,
        decoding: Decoding,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
    ) -> None:
        super().__init__(names, labels, classes, attribution)
        self.decoding = decoding
        self.channels, self.depth = decoding.channels, decoding.depth

    def open(self, number: int) -> IO[bytes]:
        """The encoded picture, to be read and closed.

        Raises:
            OSError: it cannot be read.
        """
        raise NotImplementedError

    def read(self, number: int) -> np.ndarray:
        try:
            with self.open(number) as file:
                return decode_image(file, self.names[number], self.decoding)
        except OSError as error:
            raise UnreadableImage(self.names[number], in_words(error)) from None

    def decoded_with(self, **options: Any) -> "ImageSet":
        other = copy.copy(self)
        other.decoding = replace(self.decoding, **options)
        return other

    @property
    def decoded_on_gpu(self) -> bool:
        return self.decoding.jpeg_device is not None


class FileImages(EncodedImages):
    """Pictures in files.

    Args:
        folder: what the files are relative to.
        names, labels, classes, attribution: as in ImageSet.
        files: the paths of the pictures; by default their names are their paths.
        decoding: how bytes become arrays; `Decoding()` by default.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
        files: Sequence[str] | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        super().__init__(decoding or Decoding(), names, labels, classes, attribution)
        self.folder = folder
        self._files = None if files is None else Names(files)

    @property
    def files(self) -> Names:
        """Paths of the pictures, relative to the folder."""
        return self.names if self._files is None else self._files

    def open(self, number: int) -> IO[bytes]:
        return open_regular(self.folder / self.files[number])

    def fingerprint(self) -> str:
        return digest([iter(self.names), (size_and_date(self.folder / file) for file in self.files)])


class ArrayImages(ImageSet):
    """Pictures in one array (N, H, W, C) of uint8 or uint16, which may be an .npy file mapped into memory.

    Args:
        array: the pictures; its channels and bits are those of the set.
        names, labels, classes, attribution: as in ImageSet.
        channels, depth: what `read` gives where it is not what the array holds.
    """

    def __init__(
        self,
        array: np.ndarray | Sequence[np.ndarray],
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        attribution: str | None = None,
        channels: int | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__(names, labels, classes, attribution)
        array = array if isinstance(array, np.ndarray) else np.stack(array)
        if array.ndim != 4 or array.dtype not in (np.uint8, np.uint16):
            raise UsageError(f"images must be uint8 or uint16 (N, H, W, C), got {array.dtype} {array.shape}")
        self.array = array
        self.channels = array.shape[-1] if channels is None else channels
        self.depth = 8 * array.dtype.itemsize if depth is None else depth

    def read(self, number: int) -> np.ndarray:
        return to_depth(to_channels(np.asarray(self.array[number]), self.channels), self.depth)

    def __getstate__(self) -> dict[str, Any]:  # a mapped file goes to another process as its path, not as a copy
        if isinstance(self.array, np.memmap) and isinstance(self.array.base, mmap.mmap):
            array = self.array
            order = "C" if array.flags.c_contiguous else "F"
            return {**self.__dict__, "array": (array.filename, array.dtype, "r", array.offset, array.shape, order)}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.array, tuple):
            self.array = np.memmap(*self.array)


class Wrapped(ImageSet):
    """Another set under other class numbers, and the base of those that see one in another way."""

    def __init__(self, images: ImageSet, names: Sequence[str], labels: Sequence[int] | None) -> None:
        super().__init__(names, labels, images.classes, images.attribution)
        self.images = images
        self.captions = images.captions
        self.channels, self.depth, self.window = images.channels, images.depth, images.window
        self.left_out = images.left_out

    def read(self, number: int) -> np.ndarray:
        return self.images.read(number)

    def decoded_with(self, **options: Any) -> ImageSet:
        return self._over(self.images.decoded_with(**options))

    @property
    def decoded_on_gpu(self) -> bool:
        return self.images.decoded_on_gpu

    def _over(self, images: ImageSet) -> ImageSet:
        """The same view of other pixels."""
        if images is self.images:
            return self
        other = copy.copy(self)
        other.images = images
        return other

    def fingerprint(self) -> str:
        return self.images.fingerprint()


class Subset(Wrapped):
    """Some pictures of another set."""

    places_in = "numbers"

    def __init__(self, images: ImageSet, numbers: Sequence[int] | NDArray[np.int64]) -> None:
        self.numbers = np.asarray(numbers, np.int64)
        large = is_large(self.numbers)
        super().__init__(images, self._chosen(images.names) if large else images.names.take(self.numbers), None)
        if isinstance(images.labels, Labels):
            self.labels = Labels(images.labels.array[self.numbers])
        elif images.labels is not None:
            self.labels = [images.labels[number] for number in self.numbers.tolist()]
        if images.captions is not None:
            own, whole = images.captions, large and isinstance(images.captions, Names)
            self.captions = self._chosen(own) if whole else [own[number] for number in self.numbers.tolist()]

    def _chosen(self, names: Any) -> Names:
        return ChosenNames(names, self.numbers)

    def index(self) -> dict[str, Column]:
        return {name: column for name, column in super().index().items() if name in ("labels", "places")}

    def hold_index(self, columns: Mapping[str, Column]) -> None:
        super().hold_index(columns)
        self.names = self._chosen(self.images.names)
        if isinstance(self.images.captions, Names):
            self.captions = self._chosen(self.images.captions)

    def read(self, number: int) -> np.ndarray:
        return self.images.read(int(self.numbers[number]))

    def fingerprint(self) -> str:
        return digest([self.images.fingerprint(), rows(self.numbers)])


class CachedImages(Wrapped):
    """Another set, whose pictures are kept in memory once they were read, up to a limit.

    Args:
        images: the set.
        limit: bytes to keep at most; pictures read after it is full are decoded every time.
    """

    def __init__(self, images: ImageSet, limit: int) -> None:
        super().__init__(images, images.names, images.labels)
        self._room = limit
        self._kept: dict[int, np.ndarray] = {}

    def _over(self, images: ImageSet) -> ImageSet:
        return self if images is self.images else images  # what is kept here are other pixels

    def read(self, number: int) -> np.ndarray:
        picture = self._kept.get(number)
        if picture is None:
            picture = self.images.read(number)
            if picture.nbytes <= self._room:
                self._room -= picture.nbytes
                self._kept[number] = picture
        return picture
