"""Token sets: the indices of many images, mapped into memory, read by number or in batches."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexel.arrays import ONLY, open_arrays, read_array
from lexel.data.held_out import hold_out_order, renumbered
from lexel.data.names import Names
from lexel.data.order import Positions, crop_choices
from lexel.data.tokens.format import (
    INDEX,
    MANIFEST_PARTIAL,
    Manifest,
    ShardDescription,
    digest_of_names,
    features_path,
    read_manifest,
    read_shard_description,
    shard_path,
)
from lexel.data.tokens.layouts import Layouts
from lexel.errors import UsageError
from lexel.regular import expanded, sha256_of
from lexel.token_spec import TokenSpec

Verify = Literal["lazily", "now", "never"]


class TokenBatch(NamedTuple):
    """The tokens of some images."""

    indices: Tensor  # (B, *grid) int64
    labels: Tensor | None  # (B,) int64; None for a set without labels
    numbers: Tensor  # (B,) int64: which images of the set these are
    captions: Tensor | None = None  # (B, length, channels) float16: features of captions; None for a set without


class TokenSet:
    """The tokens of a set of images, mapped into memory.

    Attributes:
        grid: shape of an image's indices; where images have grids of their own, of a subset with one (`buckets`).
        token_spec: how they lie: grids, codebooks; likewise.
        own_grids: whether images have grids of their own, as those encoded in their own sizes.
        sizes: int64 (N, 2), height and width of each image before it was padded to its grid; None with one grid.
        books: codebooks a cell; None where a cell has one code.
        codebook_size: indices lie below it.
        crops: versions of each image; the first is the centred one.
        fingerprint: of the tokenizer that made them.
        names: one per image.
        labels: int64 (N,), or None.
        classes: the name of each class.
        captions: one per image, or None.
        caption_features: length and channels of the features of each caption, or None.
        captions_fingerprint: names these features, or None.
        attribution: what must be shown beside these images, or None.
        unreadable: the reasons of the images left out, by name.
        facts: all of `tokens.json`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        facts: dict[str, Any],
        shards: Sequence[ShardDescription],
        verify: Verify,
    ) -> None:
        self.folder = folder
        self.facts = facts
        self.codebook_size = manifest.codebook_size
        self.books = manifest.books
        self._layouts = Layouts.of_shards(shards, manifest)
        self.crops = manifest.crops
        self.fingerprint = manifest.fingerprint
        self.classes = manifest.classes
        self.attribution = manifest.attribution
        self.names: Sequence[str] = Names([name for shard in shards for name in shard.names])
        labels = [label for shard in shards for label in shard.labels or ()] if manifest.labelled else None
        self.labels = None if labels is None else np.array(labels, np.int64)
        texts = [shard.captions for shard in shards]
        with_captions = bool(texts) and all(part is not None for part in texts)
        self.captions: Sequence[str] | None = (
            Names([text for part in texts for text in part or ()]) if with_captions else None
        )
        layout = manifest.caption_features
        self.caption_features = None if layout is None else (layout.length, layout.channels)
        self.captions_fingerprint = None if layout is None else layout.fingerprint
        self._feature_digests = [shard.caption_features.sha256 for shard in shards if shard.caption_features]
        self._feature_shards: dict[int, np.ndarray] = {}
        self.unreadable: dict[str, str] = {name: why for shard in shards for name, why in shard.unreadable.items()}
        self._dtype = np.dtype(manifest.dtype)
        self._rows = np.arange(len(self.names))  # where the images of this set, or part of it, lie in the shards
        self._ends = np.cumsum([len(shard.names) for shard in shards])
        self._digests = [shard.sha256 for shard in shards]
        self._verify = verify
        self._shards: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: Verify = "lazily") -> "TokenSet":
        """The token set in a folder.

        Args:
            folder: as `write_tokens` left it.
            verify: when to compare the shards with their checksums: "lazily" when each is first used, "now", or
                "never". Sizes and types are always checked.

        Raises:
            UsageError: there is no token set, its writing was not finished, or a shard is missing or damaged.
        """
        folder = expanded(folder)
        if not folder.is_dir():
            raise UsageError(f"there is no folder {str(folder)!r}; give one that `lexel encode` wrote")
        if not (folder / INDEX).is_file():
            if (folder / MANIFEST_PARTIAL).is_file():
                plan, _ = read_manifest(folder / MANIFEST_PARTIAL)
                there = len(list(folder.glob("shard-*.json")))
                wanted = -(-plan.images // plan.shard_size)
                raise UsageError(
                    f"{folder} is not finished: {there} of {wanted} shards are written; run the same command again"
                )
            raise UsageError(f"{folder} holds no tokens: it has no {INDEX}; give a folder that `lexel encode` wrote")
        manifest, facts = read_manifest(folder / INDEX)
        if manifest.shards is None:
            raise UsageError(f"{folder / INDEX} is damaged: it does not say how many shards there are")
        shards = [_complete_shard(folder, number, manifest) for number in range(manifest.shards)]
        tokens = cls(folder, manifest, facts, shards, verify)
        if len(tokens.names) + len(tokens.unreadable) > manifest.images:
            raise UsageError(
                f"{folder} is damaged: its shards hold more than the {manifest.images:,} images of {INDEX}"
            )
        if len(tokens.names) == manifest.images and digest_of_names(tokens.names) != manifest.names:
            raise UsageError(f"{folder} is damaged: the names in its shards are not those that {INDEX} was made of")
        for number in range(len(shards)):
            with open_arrays(shard_path(folder, number, ".npy")) as arrays:
                arrays.header(ONLY, *tokens._layout(number))
        if verify == "now":
            for number in range(len(shards)):
                tokens.shard(number)
                tokens._features(number)
        return tokens

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def own_grids(self) -> bool:
        return self._layouts.own

    @property
    def sizes(self) -> np.ndarray | None:
        return None if self._layouts.sizes is None else self._layouts.sizes[self._rows]

    @property
    def token_spec(self) -> TokenSpec:
        """The layout of each image's tokens.

        Raises:
            UsageError: images of this set have several grids.
        """
        return self._spec_of(self._rows)

    def _spec_of(self, rows: np.ndarray) -> TokenSpec:
        """The layout of the tokens of the images in these rows, if all have one grid."""
        found = self._layouts.of_rows(rows)
        if not len(found):
            raise UsageError(f"there is no image of {self.folder} here, so that there is no grid")
        if len(found) != 1:
            raise UsageError(
                f"the images in {self.folder} have {len(found)} grids, and this needs one: encode them at one --size, "
                "or take those of one grid (TokenSet.buckets)"
            )
        return self._layouts.specs[int(found[0])]

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of an image's indices; raises UsageError where images have several."""
        return self.token_spec.shape

    def buckets(self) -> dict[TokenSpec, "TokenSet"]:
        """The images of each grid as a set of its own, by how their tokens lie; the most frequent first."""
        which = self._layouts.which(self._rows)
        found, counts = np.unique(which, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self._layouts.specs[one]: self.subset(np.flatnonzero(which == one)) for one in found[order].tolist()}

    def alike(self, numbers: Sequence[int] | np.ndarray, at_most: int) -> Iterator[np.ndarray]:
        """These numbers in their order, in pieces of at most so many whose images have one grid."""
        numbers = np.asarray(numbers, np.int64)
        which = self._layouts.which(self._rows[numbers])
        edges = np.concatenate([[0], np.flatnonzero(np.diff(which)) + 1, [len(numbers)]])
        for begin, end in itertools.pairwise(edges):
            for first in range(begin, end, at_most):
                yield numbers[first : min(first + at_most, end)]

    def by_grid(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """These numbers ordered by their images' grids, for `alike` to make few pieces of them."""
        numbers = np.asarray(numbers, np.int64)
        return numbers[np.argsort(self._layouts.which(self._rows[numbers]), kind="stable")]

    def require(self, fingerprint: str) -> None:
        """Refuses to be read by another tokenizer than the one that made these tokens.

        Raises:
            UsageError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"the tokens in {self.folder} were made by another tokenizer "
                f"({self.fingerprint[:12]} instead of {fingerprint[:12]}); encode the images again with this one"
            )

    def tokens(self, numbers: Sequence[int] | np.ndarray, crops: int | np.ndarray = 0) -> Tensor:
        """The indices of images by their numbers: int64 (len(numbers), *grid).

        Args:
            numbers: in [0, len(self)).
            crops: which version of each image, one for all or one each.

        Raises:
            UsageError: these images have several grids.
        """
        crops = np.broadcast_to(crops, len(numbers))
        if not self.own_grids:
            result = np.empty((len(numbers), *self.grid), np.int64)
            for shard, chosen, rows in self._places(numbers):
                result[chosen] = self.shard(shard)[rows, crops[chosen]]
            return torch.from_numpy(result)
        spec = self._spec_of(self._rows[np.asarray(numbers, np.int64)])
        flat = np.empty((len(numbers), spec.length), np.int64)
        if crops.any():
            raise UsageError(f"the images in {self.folder} have one version each")
        for shard, chosen, rows in self._places(numbers):
            starts = self._layouts.starts[self._bounds(shard)[0] + rows]
            flat[chosen] = self.shard(shard)[starts[:, None] + np.arange(spec.length)]
        return torch.from_numpy(flat.reshape(len(numbers), *spec.shape))

    def features(self, numbers: Sequence[int] | np.ndarray) -> Tensor | None:
        """Features of captions of images by their numbers, float16 (n, length, channels); None for a set without."""
        if self.caption_features is None:
            return None
        result = np.empty((len(numbers), *self.caption_features), np.float16)
        for shard, chosen, rows in self._places(numbers):
            result[chosen] = self._features(shard)[rows]
        return torch.from_numpy(result)

    def _places(self, numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each shard with some of these images, which of them (bool), and their rows in it."""
        rows = self._rows[np.asarray(numbers, np.int64)]
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard in np.flatnonzero(np.bincount(shards)).tolist():  # `np.unique` would import masked arrays
            chosen = shards == shard
            yield shard, chosen, rows[chosen] - self._bounds(shard)[0]

    def _bounds(self, shard: int) -> tuple[int, int]:
        """The rows [first, end) of a shard, counted over all shards."""
        return int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])

    def subset(self, numbers: Sequence[int] | np.ndarray) -> "TokenSet":
        """The images with these numbers, in this order."""
        part = object.__new__(TokenSet)
        part.__dict__.update(self.__dict__)
        numbers = np.asarray(numbers, np.int64)
        part._rows = self._rows[numbers]
        part.names = Names([self.names[number] for number in numbers.tolist()])
        part.labels = None if self.labels is None else self.labels[numbers]
        if self.captions is not None:
            part.captions = Names([self.captions[number] for number in numbers.tolist()])
        return part

    def with_classes(self, classes: Sequence[str]) -> "TokenSet":
        """The same tokens, their labels numbered as in `classes`, by the names of the classes.

        Raises:
            UsageError: an image has a class that is not among them, or there are no labels.
        """
        if self.labels is None:
            raise UsageError(f"the tokens in {self.folder} have no classes")
        try:
            labels = renumbered(self.labels.tolist(), self.classes, classes)
        except UsageError as error:
            raise UsageError(f"{self.folder}: {error}") from None
        part = self.subset(np.arange(len(self)))
        part.labels, part.classes = np.array(labels, np.int64), list(classes)
        return part

    def hold_out(self, fraction: float) -> tuple["TokenSet", "TokenSet"]:
        """Two sets, the rest and the held-out part: at least one image, chosen by the hashes of the names."""
        order, count = hold_out_order(self.names, fraction)
        return self.subset(np.sort(order[count:])), self.subset(np.sort(order[:count]))

    def histogram(self) -> Tensor:
        """Counts of each code over all versions: int64 (codebook_size,)."""
        counts = torch.zeros(self.codebook_size, dtype=torch.int64)
        for crop in range(self.crops):
            for numbers in self.alike(self.by_grid(range(len(self))), 4096):
                counts += torch.bincount(self.tokens(numbers, crop).flatten(), minlength=self.codebook_size)
        return counts

    def training_batches(
        self, batch_size: int, seed: int, first_step: int = 0, rank: int = 0, processes: int = 1
    ) -> Iterator[TokenBatch]:
        """An endless iterator over the batches of step first_step, first_step + 1, ...

        As for images: a batch, the versions of its images included, is a function of (seed, step) alone, batch_size
        counts all processes, and process r takes the r-th slice.
        """
        if batch_size < 1 or batch_size % processes:
            raise UsageError(f"{processes} processes cannot share a batch of {batch_size} images evenly")
        if not 0 <= rank < processes:
            raise UsageError(f"rank must lie in [0, {processes}) for {processes} processes, got {rank}")
        if len(self) == 0:
            raise UsageError(f"{self.folder} holds no images")
        positions, share = Positions(len(self), seed), batch_size // processes
        choices = crop_choices(len(self), self.crops, seed)

        def batch_of(step: int) -> TokenBatch:
            first = step * batch_size + rank * share
            places = [positions[position] for position in range(first, first + share)]
            numbers = np.array([number for _, number in places])
            return self._batch(numbers, np.array([choices(epoch, number) for epoch, number in places]))

        return map(batch_of, itertools.count(first_step))

    def ordered_batches(
        self, batch_size: int, rank: int = 0, processes: int = 1, crop: int = 0
    ) -> Iterator[TokenBatch]:
        """Every image once, in one version; process r of P gets the images r, r + P, r + 2P, ..., un-padded.

        A batch has one grid; where images have their own it ends where the next image has another.
        """
        for numbers in self.alike(np.arange(rank, len(self), processes), batch_size):
            yield self._batch(numbers, crop)

    def _batch(self, numbers: np.ndarray, crops: int | np.ndarray) -> TokenBatch:
        labels = None if self.labels is None else torch.from_numpy(self.labels[numbers])
        return TokenBatch(self.tokens(numbers, crops), labels, torch.from_numpy(numbers), self.features(numbers))

    def shard(self, number: int) -> np.ndarray:
        """A shard's tokens (rows, crops, *grid), or one after the other (tokens,) where images have grids of their own.

        Mapped into memory; checked when it is first used.
        """
        if number not in self._shards:
            path = shard_path(self.folder, number, ".npy")
            self._compare(path, self._digests[number])
            indices = read_array(path, *self._layout(number), mapped=True)
            if self._verify != "never" and indices.size and indices.max() >= self.codebook_size:
                raise UsageError(f"{path} is damaged: it has the index {indices.max()} for {self.codebook_size} codes")
            self._shards[number] = indices
        return self._shards[number]

    def _features(self, number: int) -> np.ndarray:
        """Features of a shard's captions (rows, length, channels), mapped; checked when they are first used."""
        if number not in self._feature_shards and self.caption_features is not None:
            path = features_path(self.folder, number)
            self._compare(path, self._feature_digests[number])
            first, end = self._bounds(number)
            shape = " ".join(map(str, (end - first, *self.caption_features)))
            self._feature_shards[number] = read_array(path, shape, np.float16, mapped=True)
        return self._feature_shards.get(number, np.empty(0, np.float16))

    def _compare(self, path: Path, digest: str) -> None:
        """Compares a file with its checksum, unless that was not wanted."""
        if self._verify != "never" and sha256_of(path) != digest:
            raise UsageError(f"{path} is damaged: its content does not match its checksum; encode it again")

    def _layout(self, number: int) -> tuple[str, type]:
        """Shape and type of a shard's array."""
        first, end = self._bounds(number)
        if self.own_grids:
            return str(self._layouts.tokens_of(first, end)), self._dtype.type
        return " ".join(map(str, (end - first, self.crops, *self.grid))), self._dtype.type

    def __getstate__(self) -> dict[str, Any]:  # mapped files do not travel to other processes; they open them again
        return {**self.__dict__, "_shards": {}, "_feature_shards": {}}


def _complete_shard(folder: Path, number: int, manifest: Manifest) -> ShardDescription:
    """Reads a shard's .json; its files are there and as long as it says."""
    files = [shard_path(folder, number, suffix) for suffix in (".json", ".npy")]
    if manifest.caption_features is not None:
        files.append(features_path(folder, number))
    for path in files:
        if not path.is_file():
            raise UsageError(f"{folder} is damaged: {path.name} is missing")
    shard = read_shard_description(files[0], manifest)
    sizes = [shard.bytes] + ([] if shard.caption_features is None else [shard.caption_features.bytes])
    for path, wanted in zip(files[1:], sizes, strict=True):
        size = path.stat().st_size
        if size != wanted:
            raise UsageError(f"{folder} is damaged: {path.name} has {size:,} bytes instead of {wanted:,}")
    return shard
