"""Where images come from: folders and sets, .npz files, token sets. All of them numbered, read in ascending order."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lexel.data import (
    TRANSFORMS,
    ImageSet,
    Transform,
    UnreadableImage,
    open_images,
    ordered_batches,
    to_images,
)
from lexel.data.images import digest
from lexel.data.tokens import INDEX, TokenSet
from lexel.errors import UsageError, unknown
from lexel.metrics import NpzImages, Protocol
from lexel.runtime import Runtime
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer


class Source:
    """Numbered images of one size, read in ascending order. Images come out float (B, 3, H, W) in [-1, 1]."""

    size: tuple[int, int]  # height, width
    name: str

    def __init__(self) -> None:
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (images, their numbers int64)."""
        raise NotImplementedError

    def listing(self) -> str:
        """A fingerprint that is quick to take: of names, sizes and dates of files, not of all their bytes."""
        raise NotImplementedError


NATIVE = "native"  # stands where a transform's name stands: pictures in their own sizes


class Pictures(Source):
    """A set of pictures of any sizes, through a transform; whole and one by one where that is None."""

    def __init__(self, images: ImageSet, transform: Transform | None, workers: int, chosen: Sequence[int]) -> None:
        super().__init__()
        self._images = images if len(chosen) == len(images) else images.subset(chosen)
        self._transform, self._workers = transform, workers
        self.size = (0, 0) if transform is None else (transform.size, transform.size)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(numbers):
            return
        part = self._images.subset(numbers)
        at_once = 1 if self._transform is None else batch_size
        batches = ordered_batches(part, self._transform, at_once, workers=self._workers)
        place = torch.tensor(numbers)
        for batch in batches:
            yield batch.images, place[batch.numbers]
        self.unreadable.update(batches.unreadable)

    def listing(self) -> str:
        return self._images.fingerprint()


class Archive(Source):
    """The images in an .npz file."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__()
        self._images = NpzImages(path)
        self._count = min(len(self._images), limit or len(self._images))
        self.size = (self._images.shape[1], self._images.shape[2])

    def __len__(self) -> int:
        return self._count

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen, pictures in self._images.batches(numbers, batch_size):
            yield to_images(pictures), chosen

    def listing(self) -> str:
        status = self._images.path.stat()
        return digest(["npz", self._images.shape, self._count, status.st_size, status.st_mtime_ns])


class Tokens(Source):
    """A token set, decoded as it is read."""

    def __init__(self, tokens: TokenSet, tokenizer: Tokenizer, where: Runtime, limit: int | None) -> None:
        super().__init__()
        fingerprint = tokenizer.fingerprint()
        tokens.require(fingerprint)
        self._tokens, self._tokenizer, self._where = tokens, tokenizer.to(where.device), where
        self._count = min(len(tokens), limit or len(tokens))
        self.size = tokenizer.image_size(tokens.grid[-tokenizer.autoencoder.axes :])

    def __len__(self) -> int:
        return self._count

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(numbers), batch_size):
            chosen = list(numbers[first : first + batch_size])
            with self._where.autocast():
                yield (
                    self._tokenizer.decode(self._tokens.tokens(chosen).to(self._where.device)).float(),
                    torch.tensor(chosen),
                )

    def listing(self) -> str:
        histogram = self._tokens.histogram().tolist()
        return digest([self._tokens.fingerprint, list(self._tokens.names), self._count, histogram])


class AsItIs(Transform):
    """Refuses pictures of another size instead of changing them: generated images are measured as they are."""

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        if array.shape[:2] != (self.size, self.size):
            height, width = array.shape[:2]
            raise UsageError(
                f"samples must all be {self.size} x {self.size} pixels like the first one, got {height} x {width}"
            )
        return array


def open_samples(
    samples: str | Path | ImageSet | TokenSet,
    tokenizer: Tokenizer | None,
    where: Runtime,
    workers: int,
    limit: int | None,
) -> Source:
    """Generated images behind one face, whatever they lie in; see `evaluate_samples`."""
    if isinstance(samples, str | Path):
        path = Path(samples).expanduser()
        if path.suffix == ".npz":
            return Archive(path, limit)
        if (path / INDEX).is_file():
            samples = TokenSet.open(path)
    if isinstance(samples, TokenSet):
        if tokenizer is None:
            raise UsageError(f"{samples.folder} holds tokens; give the tokenizer that made them to decode them")
        return Tokens(samples, tokenizer, where, limit)
    images = open_set(samples, None, None)
    height, width = _size_of_first(images)
    if height != width:
        raise UsageError(f"samples must be square, got {height} x {width} pixels")
    return Pictures(images, AsItIs(height), workers, range(min(len(images), limit or len(images))))


def _size_of_first(images: ImageSet) -> tuple[int, int]:
    """Height and width of the first picture that can be read."""
    for number in range(len(images)):
        try:
            height, width, _ = images.read(number).shape
        except UnreadableImage:
            continue
        return height, width
    raise UsageError(f"none of the {len(images)} samples can be read; the first is {images.names[0]}")


def open_set(source: str | Path | ImageSet, split: str | None, size: int | None) -> ImageSet:
    """A set of images that was given, or is to be opened."""
    return source if isinstance(source, ImageSet) else open_images(source, split, size)


def chosen_numbers(count: int, limit: int | None) -> Sequence[int]:
    """At most `limit` of `count` numbers, evenly spaced.

    Raises:
        UsageError: the limit is below 2.
    """
    if limit is not None and limit < min(2, count):
        raise UsageError(f"limit must be at least 2 images, got {limit}")
    return evenly_spaced(count, limit)


def resized(protocol: Protocol, size: int | Literal["native"] | None) -> Protocol:
    """The protocol at another size of images, if one is given; whole pictures of size 0 for "native"."""
    if size == "native":
        return dataclasses.replace(protocol, transform=NATIVE, size=0)
    return protocol if size is None or size == protocol.size else dataclasses.replace(protocol, size=size)


def transform_of(protocol: Protocol) -> Transform | None:
    """What makes squares of pictures under a protocol; None leaves them whole."""
    if protocol.transform == NATIVE:
        return None
    if protocol.transform not in TRANSFORMS:
        raise unknown("transform", protocol.transform, TRANSFORMS)
    return TRANSFORMS[protocol.transform](protocol.size)
