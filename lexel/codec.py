"""Folders of pictures through a tokenizer: reconstructions, token sets, and pictures from token sets."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.data import (
    PIXEL_LIMIT,
    ImageSet,
    Transform,
    UnreadableImage,
    crop_back,
    first_reason,
    open_images,
    ordered_batches,
    to_images,
    to_uint8,
)
from lexel.data.depth import to_depth
from lexel.data.tokens import TokenBatch, TokenSet, write_tokens
from lexel.data.unreadable import check_unreadable
from lexel.distributed import launched
from lexel.errors import UsageError
from lexel.memory import check_memory
from lexel.parts import Part
from lexel.png_files import Strips, check_targets, write_pngs
from lexel.provenance import public_name
from lexel.runtime import ProgressCallback, Runtime
from lexel.text_encoder import TextEncoder, caption_features
from lexel.tiling import Read, Tiled
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer

NATIVE_PIXELS = 2**22  # the largest picture taken whole by default: attention grows with the square of the pixels

SHARD = 4096  # pictures in a file of a token set: what an interruption can cost


class CodecResult(NamedTuple):
    """The result of a pass over pictures."""

    written: int
    unreadable: dict[str, str]  # the reason, by name


class Pair(NamedTuple):
    """A picture and what the tokenizer makes of it."""

    name: str
    original: np.ndarray  # uint8 (H, W, 3)
    reconstruction: np.ndarray  # uint8 (H, W, 3)


class Codec:
    """A tokenizer at its runtime, applied to whole sets.

    Args:
        tokenizer: any; put on the runtime's device and in evaluation mode.
        runtime: device and precision.
        transform: resizes and crops images; None takes them whole, padded to the tokenizer's factor by repeating
            their edge, and cropped back.
        batch_size: pictures at a time; whole ones come one by one.
        workers: processes that read pictures; None for as many as pay.
        native_pixels: whole pictures with more pixels are left out and named; by default NATIVE_PIXELS, and no limit
            of their own where there are tiles.
        pixel_limit: files with more pixels are not decoded, and named.
        tile, overlap: larger pictures go through the tokenizer in tiles; see `Tiled`.

    Attributes:
        seam: what the tiles change, measured on a window of the first picture that needs several, in words; None if
            none did, or tiles equal the whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        runtime: Runtime,
        transform: Transform | None,
        batch_size: int = 16,
        workers: int | None = 0,
        native_pixels: int | None = None,
        pixel_limit: int = PIXEL_LIMIT,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        if tile is None and overlap is not None:
            raise UsageError("an overlap is of tiles; give the tile's side too")
        self.tiled = None if tile is None else Tiled(tokenizer, tile, overlap)
        if transform is not None:
            tokenizer.grid(transform.size, transform.size)  # raises where the size does not fit
            side = transform.size if tile is None else min(tile, transform.size)
            check_memory(tokenizer, runtime, side, side, batch_size)
        self.tokenizer = tokenizer.to(runtime.device).eval()
        self.model: Tokenizer | Tiled = self.tiled or self.tokenizer  # what pictures go through
        self.runtime = runtime
        self.transform = transform
        self.batch_size = batch_size
        self.workers = workers
        self.native_pixels = native_pixels or (NATIVE_PIXELS if tile is None else pixel_limit)
        self.pixel_limit = pixel_limit
        self.seam: str | None = None

    def open(self, source: str | Path | ImageSet, split: str | None = None, max_unreadable: float = 1.0) -> ImageSet:
        """The images of a source, with the channels that the tokenizer takes."""
        if isinstance(source, ImageSet):
            return source
        return open_images(
            source,
            split,
            self.transform.size if self.transform else None,
            channels=self.tokenizer.channels,
            pixel_limit=self.pixel_limit,
            max_unreadable=max_unreadable,
        )

    def through(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of any size through the vocabulary and back, clamped to [-1, 1]."""
        height, width = images.shape[-2:]
        with self.runtime.autocast(), torch.no_grad():
            padded = self.tokenizer.pad(images.to(self.runtime.device))
            self._measure_seam(padded, "the first batch")
            return crop_back(self.model.decode(self.model.encode(padded)), height, width)

    def _measure_seam(self, images: Tensor, name: str) -> None:
        """Sets `seam` by the first images (B, C, H, W) that have one, on a window that holds one each way."""
        tiled = self.tiled
        if tiled is None or self.seam or max(images.shape[-2:]) <= tiled.tile or tiled.exact:
            return
        side = 2 * tiled.tile - tiled.overlap
        window = images[:1, :, :side, :side].to(self.runtime.device)
        height, width = window.shape[-2:]
        try:
            check_memory(self.tokenizer, self.runtime, height, width, 1)
        except UsageError:
            self.seam = f"seams were not measured: a window of {width:,} x {height:,} pixels does not fit in memory"
            return
        seam = tiled.seam(window)
        self.seam = (
            f"measured on {width:,} x {height:,} pixels of {name}: {100 * seam.tokens:.2f} % of the tokens differ from "
            f"the whole picture's, the reconstruction by {seam.overlap:.2f} of 255 levels where tiles overlap and "
            f"{seam.interior:.2f} elsewhere"
        )

    def _check_whole(self, height: int, width: int) -> None:
        """Refuses a whole picture, or the tiles of it, that has too many pixels or does not fit in memory."""
        if height * width > self.native_pixels:
            raise UsageError(f"{width} x {height} is more than the {self.native_pixels:,} pixels taken whole")
        sides = self.tokenizer.fitting_size(height, width)
        tile = max(sides) if self.tiled is None else self.tiled.tile
        check_memory(self.tokenizer, self.runtime, min(tile, sides[0]), min(tile, sides[1]), 1)

    def _tokens_of(self, pixels: np.ndarray, name: str = "the first picture") -> Tensor:
        """The tokens of a picture (1, H, W, C), which may lie in a file; a tile is read at a time."""
        height, width = pixels.shape[1:3]
        fitting = self.tokenizer.fitting_size(height, width)
        read = _reader(pixels, self.runtime.device)
        with self.runtime.autocast():
            if self.tiled is None or max(fitting) <= self.tiled.tile:
                return self.tokenizer.encode(read(0, fitting[0], 0, fitting[1])).cpu()
            side = 2 * self.tiled.tile - self.tiled.overlap
            self._measure_seam(read(0, min(side, fitting[0]), 0, min(side, fitting[1])), name)
            return self.tiled.encode_from(read, *fitting).cpu()

    def _strips(self, indices: Tensor, height: int, width: int, beside: np.ndarray | None = None) -> Strips:
        """The picture of tokens, tile by tile, without what was padded; to the right of `beside`, pixels (H, W, C)."""
        assert self.tiled is not None
        grid, tiled = self.tokenizer.grid(*self.tokenizer.fitting_size(height, width)), self.tiled

        def rows() -> Iterator[np.ndarray]:
            done = 0
            with self.runtime.autocast():
                for strip in tiled.decode_rows(indices.to(self.runtime.device), grid):
                    made = to_uint8(crop_back(strip, height - done, width))[0]
                    yield made if beside is None else np.concatenate([beside[done : done + len(made)], made], 1)
                    done += len(made)
                    if done == height:
                        return

        return Strips(height, width if beside is None else 2 * width, rows())

    def _tiled_pictures(
        self, images: ImageSet, unreadable: dict[str, str], side_by_side: bool
    ) -> Iterator[tuple[str, Strips]]:
        """The reconstruction of every readable picture of a set, in its own size, tile by tile."""
        for number, name in enumerate(images.names):
            try:
                pixels = images.read(number)
            except UnreadableImage as error:
                unreadable[name] = error.reason
                continue
            height, width = pixels.shape[:2]
            try:
                self._check_whole(height, width)
                indices = self._tokens_of(pixels[None], name)
            except UsageError as error:
                unreadable[name] = str(error)
            else:
                yield name, self._strips(indices, height, width, to_depth(pixels, 8) if side_by_side else None)

    def pairs(self, images: ImageSet, unreadable: dict[str, str]) -> Iterator[Pair]:
        """Every readable picture of a set beside its reconstruction; the others are noted in `unreadable`."""
        at_once = self.batch_size if self.transform else 1
        batches = ordered_batches(images, self.transform, at_once, workers=self.workers)
        batches.unreadable = unreadable  # as they are found
        for batch in batches:
            if self.transform is None:
                try:
                    self._check_whole(*batch.images.shape[-2:])
                except UsageError as error:
                    unreadable[images.names[int(batch.numbers[0])]] = str(error)
                    continue
            originals, reconstructions = to_uint8(batch.images), to_uint8(self.through(batch.images))
            for number, original, reconstruction in zip(batch.numbers, originals, reconstructions, strict=True):
                yield Pair(images.names[int(number)], original, reconstruction)

    def reconstruct(
        self,
        sources: Sequence[str | Path],
        out: str | Path,
        side_by_side: bool = False,
        progress: ProgressCallback | None = None,
        max_unreadable: float = 1.0,
    ) -> CodecResult:
        """Writes the reconstruction of every picture as PNG, under the picture's own name.

        Args:
            sources: folders, files or embedded sets.
            out: the folder to write to.
            side_by_side: the original at the left of each.
            progress: called with (done, total).
            max_unreadable: the part of the pictures, or of a source's shards, that may be unreadable and left out; what
                was written before there were more stays.

        Raises:
            UsageError: no picture can be used, more than `max_unreadable` cannot, or one would be written over a file
                of another origin.
        """
        sets = [self.open(source, max_unreadable=max_unreadable) for source in sources]
        total = sum(map(len, sets))
        unreadable: dict[str, str] = {}
        check_targets((name for images in sets for name in images.names), out)

        def pictures() -> Iterator[tuple[str, np.ndarray | Strips]]:
            for images in sets:
                made: Iterable[tuple[str, np.ndarray | Strips]] = (
                    (pair.name, np.concatenate(pair[1:], 1) if side_by_side else pair.reconstruction)
                    for pair in self.pairs(images, unreadable)
                )
                if self.tiled is not None and self.transform is None:
                    made = self._tiled_pictures(images, unreadable, side_by_side)
                for picture in made:
                    check_unreadable(unreadable, total, max_unreadable)
                    yield picture
            check_unreadable(unreadable, total, max_unreadable)

        written = write_pngs(pictures(), out, total, progress)
        if not written:
            raise UsageError(f"none of the pictures can be used; {first_reason(unreadable)}")
        return CodecResult(written, unreadable)

    def encode(
        self,
        source: str | Path | ImageSet,
        out: str | Path,
        split: str | None = None,
        crops: int = 1,
        seed: int = 0,
        progress: ProgressCallback | None = None,
        part: Part | None = None,
        shard_size: int | None = None,
        captions: str | Path | TextEncoder | None = None,
        max_unreadable: float = 1.0,
    ) -> TokenSet | None:
        """Turns the pictures of a folder or embedded set into a token set; the same call again goes on.

        Without a transform each picture has a grid of its own, that of its size padded to the tokenizer's factor.

        Processes that a launcher started together (RANK of WORLD_SIZE) share the shards, and so do parts, be it in one
        folder or each in its own, for `merge_tokens`. The last to finish one folder gets the set, the others None.

        Args:
            source: a folder, a file, an embedded set, or an ImageSet.
            out: the token set's folder.
            split: "train" or "validation", where the source has such parts.
            crops: versions of each picture; the first is the centred one, the others are random.
            seed: of the random ones.
            progress: called with (done, total).
            part: only this share of the shards.
            captions: features of a caption for each picture: a file (see `CaptionFile`), or a text encoder for the
                captions that the source has.
            shard_size: pictures in a file: what an interruption can cost, and the least that a part takes.
            max_unreadable: the part of the source's shards, and of the pictures of this part, that may be unreadable.

        Raises:
            UsageError: more of them are, or none can be read, and what `write_tokens` raises.
        """
        tokenizer, whole = self.tokenizer, self.transform is None
        if tokenizer.continuous:
            raise UsageError("continuous latents have no codes, and token sets hold codes; use another tokenizer")
        side = None if self.transform is None else self.transform.size
        spec = None if side is None else tokenizer.token_spec(side, side)

        def indices(images: Tensor) -> Tensor:
            self._measure_seam(images, "the first batch")
            with self.runtime.autocast():
                return self.model.encode(images.to(self.runtime.device)).cpu()

        def layout(height: int, width: int) -> TokenSpec:
            self._check_whole(height, width)
            return tokenizer.token_spec(*tokenizer.fitting_size(height, width))

        images = self.open(source, split, max_unreadable)
        named = "an image set" if isinstance(source, ImageSet) else source
        features = caption_features(captions, images, str(named))
        origin = {"text_encoder": captions.name} if isinstance(captions, TextEncoder) else {}
        part = part or Part(1, 1)
        rank, processes = launched()
        tokens = write_tokens(
            out,
            images,
            self.transform,
            indices,
            grid=None if spec is None else spec.shape,
            codebook_size=tokenizer.codebook_size,
            books=tokenizer.quantizer.books,
            grids=None if spec is None or len(spec.grids) == 1 else spec.grids,
            fingerprint=tokenizer.fingerprint(),
            crops=crops,
            seed=seed,
            batch_size=self.batch_size,
            shard_size=shard_size or SHARD,
            workers=self.workers,
            rank=(part.number - 1) + part.parts * rank,
            processes=part.parts * processes,
            provenance={"source": public_name(named), "split": split, "size": side or "native", **origin},
            captions=features,
            tiles=None if self.tiled is None else (self.tiled.tile, self.tiled.overlap),
            layout=layout if whole else None,
            whole=self._tokens_of if whole else None,
            most_pixels=self.native_pixels if whole else None,
            max_unreadable=max_unreadable,
            progress=progress,
        )
        if tokens is not None and not len(tokens):
            raise UsageError(f"none of the {len(images)} images can be read; {first_reason(tokens.unreadable)}")
        return tokens

    def decode(self, tokens: TokenSet, out: str | Path, progress: ProgressCallback | None = None) -> CodecResult:
        """Writes the picture of every image of a token set as PNG, under the name it was encoded from.

        Raises:
            UsageError: the tokens are another tokenizer's.
        """
        tokens.require(self.tokenizer.fingerprint())
        pictures: Iterable[tuple[str, np.ndarray | Strips]] = (
            (tokens.names[int(number)], picture)
            for batch in tokens.ordered_batches(self.batch_size)
            for number, picture in zip(batch.numbers, self._pictures_of(tokens, batch), strict=True)
        )
        if not len(tokens):
            raise UsageError(f"{tokens.folder} holds no tokens; {first_reason(tokens.unreadable)}")
        check_targets(tokens.names, out)
        return CodecResult(write_pngs(pictures, out, len(tokens), progress), {})

    def _pictures_of(self, tokens: TokenSet, batch: TokenBatch) -> Sequence[np.ndarray | Strips]:
        """The pictures of a batch, uint8 (H, W, 3); without what was padded, where they have their own sizes."""
        sizes = None if tokens.sizes is None else tokens.sizes[batch.numbers.numpy()].tolist()
        if self.tiled is not None:
            own = sizes or [self.tokenizer.image_size(self.tokenizer.grid_of(batch.indices, None))] * len(batch.indices)
            return [self._strips(batch.indices[row : row + 1], *size) for row, size in enumerate(own)]
        if sizes is None:
            return list(self.pictures(batch.indices))
        grid = self.tokenizer.grid(*self.tokenizer.fitting_size(*sizes[0]))
        with self.runtime.autocast():
            images = self.tokenizer.decode(batch.indices.to(self.runtime.device), grid=grid)
        return [to_uint8(crop_back(image[None], *size))[0] for image, size in zip(images, sizes, strict=True)]

    def pictures(self, indices: Tensor) -> np.ndarray:
        """The pictures of indices (B, *grid): uint8 (B, H, W, 3)."""
        with self.runtime.autocast():
            return to_uint8(self.tokenizer.decode(indices.to(self.runtime.device)))


def _reader(pixels: np.ndarray, device: torch.device) -> Read:
    """Reads parts of a picture (1, H, W, C) as images in [-1, 1]; beyond its edges they are repeated."""
    height, width = pixels.shape[1:3]

    def read(top: int, bottom: int, left: int, right: int) -> Tensor:
        part = to_images(pixels[:, top : min(bottom, height), left : min(right, width)]).to(device)
        return F.pad(part, (0, max(0, right - width), 0, max(0, bottom - height)), mode="replicate")

    return read
