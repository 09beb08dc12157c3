"""Sources of images: folders and sets, .npz files, token sets. All of them numbered, read in ascending order."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lexel.arrays import open_arrays
from lexel.data import (
    PIXEL_LIMIT,
    TRANSFORMS,
    ImageSet,
    Transform,
    open_images,
    ordered_batches,
    to_images,
)
from lexel.data.images import digest
from lexel.data.tokens import INDEX, TokenSet
from lexel.errors import UsageError
from lexel.metrics import NpzImages, Protocol
from lexel.metrics.pixels import divided_in_float64
from lexel.registry import lookup
from lexel.regular import expanded
from lexel.runtime import Runtime
from lexel.token_spec import TokenSpec

ARRAYS = (".npz", ".npy")  # endings of files that hold images or statistics in arrays


class Source:
    """Numbered images of one size, read in ascending order. Images come out float (B, 3, H, W) in [-1, 1]."""

    size: tuple[int, int]  # height, width; (0, 0) for images of any size
    sorted_by_class: bool = False  # whether images of several classes come one class after the other

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


NATIVE = "native"  # stands where a transform's name stands: images in their own sizes


class Pictures(Source):
    """Images of a set, resized and cropped by a transform; whole and one by one where that is None.

    Args:
        images: the set.
        protocol: how files are read, and in which precision bytes are divided.
        transform: makes squares.
        workers: processes that read; None for as many as pay.
        chosen: numbers of the images to take, ascending; all of them by default.
    """

    def __init__(
        self,
        images: ImageSet,
        protocol: Protocol,
        transform: Transform | None,
        workers: int | None = 0,
        chosen: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        images = images.as_stored() if protocol.reading == "stored" else images
        self.images = images if chosen is None or len(chosen) == len(images) else images.subset(chosen)
        self._transform, self._workers = transform, workers
        self._in_float64 = protocol.division == "float64" and images.depth == 8
        self.size = (0, 0) if transform is None else (transform.size, transform.size)
        self.sorted_by_class = _ascending(self.images.labels)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(numbers):
            return
        part = self.images.subset(numbers)
        at_once = 1 if self._transform is None else batch_size
        batches = ordered_batches(part, self._transform, at_once, workers=self._workers)
        batches.unreadable = self.unreadable  # as they are found
        number_of = torch.tensor(numbers)
        for batch in batches:
            images = divided_in_float64(batch.images) if self._in_float64 else batch.images
            yield images, number_of[batch.numbers]

    def listing(self) -> str:
        return self.images.fingerprint()


class Archive(Source):
    """The images in an .npz file (`arr_0`); class labels beside them (`arr_1`) are ADM's sampler's."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__()
        self._images = NpzImages(path)
        self._count = min(len(self._images), limit or len(self._images))
        self.size = (self._images.shape[1], self._images.shape[2])
        with open_arrays(path) as arrays:
            if "arr_1" in arrays and np.issubdtype(arrays.header("arr_1").dtype, np.integer):
                self.sorted_by_class = _ascending(arrays.read("arr_1").ravel()[: self._count].tolist())

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

    def __init__(self, tokens: TokenSet, tokenizer: "ImageTokenizer", where: Runtime, limit: int | None) -> None:
        super().__init__()
        tokens.require(tokenizer.fingerprint())
        if tokens.sizes is not None:
            raise UsageError(f"the images in {tokens.folder} have their own sizes, and samples have one; decode them")
        self._tokens, self._tokenizer, self._where = tokens, on_device(tokenizer, where.device), where
        self._count = min(len(tokens), limit or len(tokens))
        self.size = (0, 0)
        if self._count:
            images, _ = next(self.batches([0], 1))
            self.size = (images.shape[-2], images.shape[-1])
        self.sorted_by_class = _ascending(None if tokens.labels is None else tokens.labels[: self._count].tolist())

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(numbers), batch_size):
            chosen = list(numbers[first : first + batch_size])
            with self._where.autocast():
                images = self._tokenizer.decode(self._tokens.tokens(chosen).to(self._where.device)).float()
            yield images, torch.tensor(chosen)

    def listing(self) -> str:
        histogram = self._tokens.histogram().tolist()
        return digest([self._tokens.fingerprint, list(self._tokens.names), self._count, histogram])


class ImageTokenizer(typing.Protocol):
    """The interface of what is evaluated: a `lexel.Tokenizer`, or another library's, as `encode` and `decode`."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to indices int64 (B, *grid), or (B, books, *grid)."""

    def decode(self, indices: Tensor) -> Tensor:
        """Indices to images (B, 3, H, W) in [-1, 1]."""

    def token_spec(self, height: int, width: int) -> TokenSpec:
        """The layout of the tokens of an image of height x width pixels."""

    def fingerprint(self) -> str:
        """A text that names the weights."""


def on_device(tokenizer: ImageTokenizer, device: torch.device) -> ImageTokenizer:
    """The tokenizer on a device, if it is a module that can be moved."""
    if isinstance(tokenizer, torch.nn.Module):
        tokenizer.to(device)
    return tokenizer


class RequireSize(Transform):
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
    tokenizer: ImageTokenizer | None,
    protocol: Protocol,
    where: Runtime,
    workers: int | None,
    limit: int | None,
    pixel_limit: int = PIXEL_LIMIT,
    max_unreadable: float = 1.0,
) -> Source:
    """Opens generated images: a folder, an .npz or .npy file, a token set or an ImageSet; see `evaluate_samples`."""
    if isinstance(samples, str | Path):
        path = expanded(samples)
        if path.suffix in ARRAYS:
            return Archive(path, limit)
        if (path / INDEX).is_file():
            samples = TokenSet.open(path)
    if isinstance(samples, TokenSet):
        if tokenizer is None:
            raise UsageError(f"{samples.folder} holds tokens; give the tokenizer that made them to decode them")
        return Tokens(samples, tokenizer, where, limit)
    images = open_set(samples, None, None, pixel_limit=pixel_limit, max_unreadable=max_unreadable)
    height, width, _ = (images.as_stored() if protocol.reading == "stored" else images).first_readable().shape
    if height != width:
        raise UsageError(f"samples must be square, got {height} x {width} pixels")
    return Pictures(images, protocol, RequireSize(height), workers, range(min(len(images), limit or len(images))))


def open_set(
    source: str | Path | ImageSet,
    split: str | None,
    size: int | None,
    channels: int = 3,
    pixel_limit: int = PIXEL_LIMIT,
    max_unreadable: float = 1.0,
) -> ImageSet:
    """A set of images that was given, or is to be opened."""
    if isinstance(source, ImageSet):
        return source
    return open_images(source, split, size, channels=channels, pixel_limit=pixel_limit, max_unreadable=max_unreadable)


def _ascending(labels: Sequence[int] | None) -> bool:
    """Whether there are several classes and they come one after the other."""
    return labels is not None and len(set(labels)) > 1 and all(a <= b for a, b in pairwise(labels))


def resized(protocol: Protocol, size: int | Literal["native"] | None) -> Protocol:
    """The protocol at another size of images, if one is given; whole images of size 0 for "native"."""
    if size == "native":
        return dataclasses.replace(protocol, transform=NATIVE, size=0)
    return protocol if size is None or size == protocol.size else dataclasses.replace(protocol, size=size)


def transform_of(protocol: Protocol) -> Transform | None:
    """The transform of a protocol; None leaves images whole."""
    if protocol.transform == NATIVE:
        return None
    return lookup(TRANSFORMS, protocol.transform, "transform")(protocol.size)
