"""Batches of images whose content depends on the seed and the step alone.

Training draws from an endless sequence of pictures: one permutation of the set after another, each a function of
(seed, epoch). Step s takes the positions s * batch_size to (s + 1) * batch_size of it, and process r of P takes the
r-th of P equal slices of those. How many worker processes read the pictures changes nothing, nor how many processes
train; a run that starts again at step s gets the batches that the first run would have got.
"""

import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lexel.data.arrays import to_images
from lexel.data.files import UnreadableImage
from lexel.data.images import ImageSet
from lexel.data.order import Positions, crop_generator
from lexel.data.pace import Pace
from lexel.data.transforms import Transform
from lexel.data.unreadable import check_unreadable
from lexel.distributed import launched
from lexel.errors import UsageError

OnError = Literal["replace", "stop"]

PREFETCH = 2  # batches that each worker reads ahead
WORTH_WORKERS = 256  # images; starting a process takes as long as reading dozens


class Batch(NamedTuple):
    """Some images of a set."""

    images: Tensor  # (B, C, H, W) float32 in [-1, 1]
    labels: Tensor | None  # (B,) int64; None for a set without labels
    numbers: Tensor  # (B,) int64: which pictures of the set these are


@dataclass(frozen=True)
class Loading:
    """Options of one process's batches. Nothing here but `batch_size` changes which images are in them.

    Attributes:
        batch_size: images a batch; in training of all processes together, in order of this process alone.
        rank, processes: this process, of how many; in training, processes times micro_batches must divide batch_size.
        micro_batches: parts in which a training takes a batch, one after the other. All processes share each of them,
            so that it holds the same images on any number of processes.
        workers: processes that read pictures; 0 reads them here, None takes as many as pay (`default_workers`).
        on_error: "replace" puts another picture in the place of an unreadable one, or leaves it out where every picture
            comes once, and notes it in `.unreadable`; "stop" raises UnreadableImage.
        device: where the batches shall lie; they travel as integers of 8 or 16 bits.
        max_unreadable: the part of the set that may be unreadable before that is an error.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    workers: int | None = 0
    on_error: OnError = "replace"
    device: str | torch.device | None = None
    max_unreadable: float = 1.0
    micro_batches: int = 1

    def check(self, images: ImageSet) -> None:
        """Raises UsageError for numbers that do not fit together."""
        if len(images) == 0:
            raise UsageError("the set holds no images")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.rank < self.processes:
            raise UsageError(f"rank must lie in [0, {self.processes}) for {self.processes} processes, got {self.rank}")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers cannot be negative, got {self.workers}")


def reading_processes(workers: int | None, images: ImageSet, transform: Transform | None) -> int:
    """How many processes read: `workers`, or as many as pay where that is None."""
    return default_workers(images, transform) if workers is None else workers


def default_workers(images: ImageSet, transform: Transform | None) -> int:
    """Processes that read images beside a network, where nobody says how many; it changes no result.

    On a machine with a GPU all cores but one, 8 at most; else the cores that PyTorch's threads leave, and one where
    they leave none; processes of a launcher share them. 0 for few images, for those in their own size, which may be
    large, and for a stream, which every reader would read whole.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if transform is None or images.window is not None or len(images) < WORTH_WORKERS or cores == 1:
        return 0
    busy = 1 if torch.cuda.is_available() else torch.get_num_threads()
    return min(8, max(1, cores // launched()[1] - busy))


def training_batches(
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    **options: Any,
) -> "TrainingBatches":
    """An endless iterator over the batches of step first_step, first_step + 1, ...

    Args:
        images: the set.
        transform: resizes and crops images; gets a random generator of its own for each picture and epoch.
        batch_size: images a step, all processes together.
        seed: decides the order and the crops.
        first_step: where to begin.
        options: of `Loading`: rank, processes, workers, ...

    Raises:
        UsageError: the sizes do not fit together, or no picture of the set is readable.
    """
    return TrainingBatches(images, transform, Loading(batch_size, **options), seed, first_step)


class _Batches:
    """Base of the iterators: batches of what workers have read, and the images that could not be, by name."""

    def __init__(self, images: ImageSet, loading: Loading) -> None:
        loading.check(images)
        self.images, self.loading = images, loading
        self.unreadable: dict[str, str] = {}

    def _note(self, unreadable: dict[str, str]) -> None:
        """Takes in what could not be read; raises UsageError once it is more than may be."""
        if unreadable:
            self.unreadable.update(unreadable)
            check_unreadable(self.unreadable, len(self.images), self.loading.max_unreadable)

    def _batch(self, pictures: "Pictures") -> Batch:
        pixels = torch.from_numpy(np.require(pictures.arrays, requirements=["C", "W"]))
        numbers, own, labels = torch.tensor(pictures.numbers), self.images.labels, None
        if own is not None:
            labels = torch.tensor([own[number] for number in pictures.numbers]).to(self.loading.device)
        return Batch(to_images(pixels.to(self.loading.device)), labels, numbers.to(self.loading.device))


class TrainingBatches(_Batches, Iterator[Batch]):
    """The iterator of `training_batches`. `unreadable` holds the reasons of the pictures replaced so far, by name.

    `pace` counts how long reading took, and how long its user waited.
    """

    def __init__(
        self, images: ImageSet, transform: Transform, loading: Loading, seed: int, first_step: int = 0
    ) -> None:
        super().__init__(images, loading)
        if loading.batch_size % (loading.processes * loading.micro_batches):
            parts = f" in {loading.micro_batches} micro-batches" if loading.micro_batches > 1 else ""
            raise UsageError(
                f"{loading.processes} processes cannot share a batch of {loading.batch_size} images evenly{parts}"
            )
        if first_step < 0:
            raise UsageError(f"the first step cannot be negative, got {first_step}")
        steps = _TrainingSteps(images, transform, loading, seed)
        readers = reading_processes(loading.workers, images, transform)
        self.pace = Pace(readers)
        self._read = look_up(steps, itertools.count(first_step), readers)

    def __next__(self) -> Batch:
        begun = time.perf_counter()
        pictures = next(self._read)
        self.pace.add(len(pictures.numbers), pictures.seconds, time.perf_counter() - begun)
        self._note(pictures.unreadable)
        return self._batch(pictures)


def ordered_batches(images: ImageSet, transform: Transform | None, batch_size: int, **options: Any) -> "OrderedBatches":
    """Every readable picture once, in order, without random crops; iterate over it as often as you like.

    Process r of P gets the pictures r, r + P, r + 2P, ...: nothing is repeated to make the shares equal, so they may
    differ by one. `Batch.numbers` says which picture is which; a batch with unreadable ones is smaller.

    Args:
        images: the set.
        transform: resizes and crops images; None gives them in their own size, for a batch_size of 1.
        batch_size: images a batch, of this process alone.
        options: of `Loading`: rank, processes, workers, ...
    """
    return OrderedBatches(images, transform, Loading(batch_size, **options))


class OrderedBatches(_Batches):
    """The iterator of `ordered_batches`. `unreadable` holds the reasons of the pictures left out so far, by name."""

    def __init__(self, images: ImageSet, transform: Transform | None, loading: Loading) -> None:
        super().__init__(images, loading)
        if transform is None and loading.batch_size != 1:
            raise UsageError(
                f"pictures in their own size come one by one: batch_size must be 1, got {loading.batch_size}"
            )
        share = range(loading.rank, len(images), loading.processes)
        self._squares = Squares(images, transform, share, loading.batch_size, loading.on_error)

    def __len__(self) -> int:
        """Batches, if every picture is readable."""
        return len(self._squares)

    def __iter__(self) -> Iterator[Batch]:
        readers = reading_processes(self.loading.workers, self.images, self._squares.transform)
        for pictures in look_up(self._squares, range(len(self)), readers):
            self._note(pictures.unreadable)
            if pictures.numbers:
                yield self._batch(pictures)


class Pictures(NamedTuple):
    """A batch as it comes out of a worker."""

    arrays: np.ndarray  # uint8 or uint16 (B, H, W, C)
    numbers: list[int]
    unreadable: dict[str, str]  # the reasons, by name
    seconds: float = 0.0  # that reading took


@dataclass
class _TrainingSteps:
    """The batch of a step, as a table that a DataLoader can look up in any process."""

    images: ImageSet
    transform: Transform
    loading: Loading
    seed: int
    positions: Positions = field(init=False)

    def __post_init__(self) -> None:
        self.positions = Positions(len(self.images), self.seed, self.images.window)

    def __getitem__(self, step: int) -> Pictures:
        begun, loading = time.perf_counter(), self.loading
        micro_batch = loading.batch_size // loading.micro_batches
        share = micro_batch // loading.processes
        first = step * loading.batch_size + loading.rank * share
        starts = range(first, first + loading.batch_size, micro_batch)
        arrays, numbers, unreadable = [], [], {}
        for position in (start + place for start in starts for place in range(share)):
            epoch, number = self.positions[position]
            picture, number, failed = self._readable(number)
            unreadable.update(failed)
            arrays.append(self.transform(picture, crop_generator(self.seed, epoch, number)))
            numbers.append(number)
        return Pictures(np.stack(arrays), numbers, unreadable, time.perf_counter() - begun)

    def _readable(self, number: int) -> tuple[np.ndarray, int, dict[str, str]]:
        """The picture with this number or the next one that can be read, and the ones that cannot."""
        failed: dict[str, str] = {}
        for _ in range(len(self.images)):
            try:
                return self.images.read(number), number, failed
            except UnreadableImage as error:
                if self.loading.on_error == "stop":
                    raise
                failed[error.name] = error.reason
                number = (number + 1) % len(self.images)
        name, reason = next(iter(failed.items()))
        raise UsageError(f"none of the {len(self.images)} images can be read; the first, {name}: {reason}")


@dataclass(frozen=True)
class Squares:
    """Batches of some images' squares, as a table; unreadable images are left out.

    `crops` squares of an image follow one another: the centred one, then those at random, each a function of (seed,
    version, number of the image).
    """

    images: ImageSet
    transform: Transform | None
    numbers: Sequence[int]
    batch_size: int
    on_error: OnError = "replace"
    crops: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / self.batch_size)

    def __getitem__(self, batch: int) -> Pictures:
        arrays, readable, unreadable = [], [], {}
        for number in self.numbers[batch * self.batch_size : (batch + 1) * self.batch_size]:
            try:
                picture = self.images.read(number)
            except UnreadableImage as error:
                if self.on_error == "stop":
                    raise
                unreadable[error.name] = error.reason
                continue
            generators = [None, *(crop_generator(self.seed, version, number) for version in range(1, self.crops))]
            arrays += [picture if self.transform is None else self.transform(picture, one) for one in generators]
            readable.append(number)
        if len(arrays) == 1:  # not copied: it may lie in a file and be larger than memory
            return Pictures(arrays[0][None], readable, unreadable)
        return Pictures(np.stack(arrays) if arrays else np.empty((0, 0, 0, 3), np.uint8), readable, unreadable)


class ErrorAsItem(Dataset[Any]):
    """A table whose errors for the user come out as items: a DataLoader would bury them in a worker's traceback."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getitem__(self, item: int) -> Pictures | UsageError:
        try:
            return self.table[item]
        except UsageError as error:
            return error


def look_up(table: Any, order: Any, workers: int) -> Iterator[Pictures]:
    """Looks the items of `order` up in the table, in this process or ahead of time in others; the order is kept.

    The others are forks of this one, except where they need CUDA.
    """
    loader: DataLoader[Any] = DataLoader(
        ErrorAsItem(table),
        batch_size=None,  # an item is a whole batch already
        sampler=order,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=_unchanged,
        multiprocessing_context="spawn" if workers and table.images.decoded_on_gpu else None,
        generator=torch.Generator(),  # else a DataLoader draws from the global stream, and validation moves training
    )
    for item in loader:
        if isinstance(item, UsageError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item
