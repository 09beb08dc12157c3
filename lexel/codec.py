"""Folders of pictures through a tokenizer: reconstructions, token sets, and pictures from token sets."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lexel.checkpoint import atomic
from lexel.data import (
    PIXEL_LIMIT,
    ImageSet,
    Transform,
    crop_back,
    first_reason,
    open_images,
    ordered_batches,
    to_display,
    to_uint8,
)
from lexel.data.tokens import TokenBatch, TokenSet, write_tokens
from lexel.errors import UsageError
from lexel.memory import check_memory
from lexel.parts import Part
from lexel.provenance import public_name
from lexel.runtime import ProgressCallback, Runtime
from lexel.text_encoder import TextEncoder, caption_features
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer

NATIVE_PIXELS = 2**22  # the largest picture taken whole by default: attention grows with the square of the pixels

WRITTEN_BY = ("Software", "Lexel")  # in the PNG files written here, which may be replaced

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
        workers: processes that read pictures.
        native_pixels: whole pictures with more pixels are left out and named.
        pixel_limit: files with more pixels are not decoded, and named.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        runtime: Runtime,
        transform: Transform | None,
        batch_size: int = 16,
        workers: int = 0,
        native_pixels: int = NATIVE_PIXELS,
        pixel_limit: int = PIXEL_LIMIT,
    ) -> None:
        if transform is not None:
            tokenizer.grid(transform.size, transform.size)  # raises where the size does not fit
            check_memory(tokenizer, runtime, transform.size, transform.size, batch_size)
        self.tokenizer = tokenizer.to(runtime.device).eval()
        self.runtime = runtime
        self.transform = transform
        self.batch_size = batch_size
        self.workers = workers
        self.native_pixels = native_pixels
        self.pixel_limit = pixel_limit

    def open(self, source: str | Path | ImageSet, split: str | None = None) -> ImageSet:
        """The images of a source, with the channels that the tokenizer takes."""
        if isinstance(source, ImageSet):
            return source
        return open_images(
            source,
            split,
            self.transform.size if self.transform else None,
            channels=self.tokenizer.channels,
            pixel_limit=self.pixel_limit,
        )

    def through(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of any size through the vocabulary and back, clamped to [-1, 1]."""
        height, width = images.shape[-2:]
        with self.runtime.autocast(), torch.no_grad():
            padded = self.tokenizer.pad(images.to(self.runtime.device))
            return crop_back(self.tokenizer.decode(self.tokenizer.encode(padded)), height, width)

    def pairs(self, images: ImageSet, unreadable: dict[str, str]) -> Iterator[Pair]:
        """Every readable picture of a set beside its reconstruction; the others are noted in `unreadable`."""
        at_once = self.batch_size if self.transform else 1
        batches = ordered_batches(images, self.transform, at_once, workers=self.workers)
        for batch in batches:
            height, width = batch.images.shape[-2:]
            if self.transform is None and height * width > self.native_pixels:
                name = images.names[int(batch.numbers[0])]
                unreadable[name] = f"{width} x {height} is more than the {self.native_pixels:,} pixels taken whole"
                continue
            if self.transform is None:
                try:
                    check_memory(self.tokenizer, self.runtime, *self.tokenizer.fitting_size(height, width), 1)
                except UsageError as error:
                    unreadable[images.names[int(batch.numbers[0])]] = str(error)
                    continue
            originals, reconstructions = to_uint8(batch.images), to_uint8(self.through(batch.images))
            for number, original, reconstruction in zip(batch.numbers, originals, reconstructions, strict=True):
                yield Pair(images.names[int(number)], original, reconstruction)
        unreadable.update(batches.unreadable)

    def reconstruct(
        self,
        sources: Sequence[str | Path],
        out: str | Path,
        side_by_side: bool = False,
        progress: ProgressCallback | None = None,
    ) -> CodecResult:
        """Writes the reconstruction of every picture as PNG, under the picture's own name.

        Args:
            sources: folders, files or embedded sets.
            out: the folder to write to.
            side_by_side: the original at the left of each.
            progress: called with (done, total).

        Raises:
            UsageError: no picture can be used, or one would be written over a file of another origin.
        """
        sets = [self.open(source) for source in sources]
        unreadable: dict[str, str] = {}
        pairs = (pair for images in sets for pair in self.pairs(images, unreadable))
        pictures = (
            (name, np.concatenate([original, reconstruction], axis=1) if side_by_side else reconstruction)
            for name, original, reconstruction in pairs
        )
        check_targets((name for images in sets for name in images.names), out)
        written = write_pngs(pictures, out, sum(len(images) for images in sets), progress)
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
        """
        tokenizer, whole = self.tokenizer, self.transform is None
        if tokenizer.continuous:
            raise UsageError("continuous latents have no codes, and token sets hold codes; use another tokenizer")
        side = None if self.transform is None else self.transform.size
        spec = None if side is None else tokenizer.token_spec(side, side)

        def indices(images: Tensor) -> Tensor:
            if whole:
                check_memory(tokenizer, self.runtime, *tokenizer.fitting_size(*images.shape[-2:]), 1)
            with self.runtime.autocast():
                return tokenizer.encode(tokenizer.pad(images.to(self.runtime.device))).cpu()

        def layout(height: int, width: int) -> TokenSpec:
            return tokenizer.token_spec(*tokenizer.fitting_size(height, width))

        images = self.open(source, split)
        named = "an image set" if isinstance(source, ImageSet) else source
        features = caption_features(captions, images, str(named))
        origin = {"text_encoder": captions.name} if isinstance(captions, TextEncoder) else {}
        part = part or Part(1, 1)
        rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
            layout=layout if whole else None,
            most_pixels=self.native_pixels if whole else None,
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
        pictures = (
            (tokens.names[int(number)], picture)
            for batch in tokens.ordered_batches(self.batch_size)
            for number, picture in zip(batch.numbers, self._pictures_of(tokens, batch), strict=True)
        )
        if not len(tokens):
            raise UsageError(f"{tokens.folder} holds no tokens; {first_reason(tokens.unreadable)}")
        check_targets(tokens.names, out)
        return CodecResult(write_pngs(pictures, out, len(tokens), progress), {})

    def _pictures_of(self, tokens: TokenSet, batch: TokenBatch) -> list[np.ndarray]:
        """The pictures of a batch, uint8 (H, W, 3); without what was padded, where they have their own sizes."""
        if tokens.sizes is None:
            return list(self.pictures(batch.indices))
        sizes = tokens.sizes[batch.numbers.numpy()]
        grid = self.tokenizer.grid(*self.tokenizer.fitting_size(*sizes[0].tolist()))
        with self.runtime.autocast():
            images = self.tokenizer.decode(batch.indices.to(self.runtime.device), grid=grid)
        pairs = zip(images, sizes.tolist(), strict=True)
        return [to_uint8(crop_back(image[None], *size))[0] for image, size in pairs]

    def pictures(self, indices: Tensor) -> np.ndarray:
        """The pictures of indices (B, *grid): uint8 (B, H, W, 3)."""
        with self.runtime.autocast():
            return to_uint8(self.tokenizer.decode(indices.to(self.runtime.device)))


def check_targets(names: Iterable[str], out: str | Path) -> None:
    """Checks that pictures of these names can be written as PNG files to a folder, before any is.

    Raises:
        UsageError: a name leads out of the folder, or a file of another origin has it.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder to write to")
    taken: set[str] = set()
    for name in names:
        taken.add(_target(name, taken))
    if out.is_dir():
        for target in sorted(taken):
            _check_overwrite(out / target)


def _target(name: str, taken: set[str]) -> str:
    """The file for a picture, by its name and the files that are taken."""
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or not plain.name or "\0" in name:
        raise UsageError(f"the name {name!r} leads out of the folder to write to")
    plain = plain.with_suffix("")
    number, target = 1, f"{plain}.png"
    while target in taken:
        number += 1
        target = f"{plain}-{number}.png"
    return target


def _check_overwrite(path: Path) -> None:
    """Refuses to write over a file that `write_pngs` did not write."""
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            ours = image.info.get(WRITTEN_BY[0]) == WRITTEN_BY[1]
    except (OSError, ValueError, SyntaxError):
        ours = False
    if not ours:
        raise UsageError(f"{path} exists and was not written by Lexel; it would be overwritten: give another folder")


def write_pngs(
    pictures: Iterable[tuple[str, np.ndarray]], out: str | Path, total: int, progress: ProgressCallback | None = None
) -> int:
    """Writes named pictures, uint8 (H, W, C), as PNG files under a folder; returns how many.

    Names may have folders in them; two that would share a file get numbers. Files that were not written here before
    are never replaced, be they the originals or others.

    Raises:
        UsageError: a name leads out of the folder, or a file of another origin has it.
    """
    out = Path(out)
    note = PngInfo()
    note.add_text(*WRITTEN_BY)
    taken: set[str] = set()
    for name, picture in pictures:
        target = _target(name, taken)
        taken.add(target)
        _check_overwrite(out / target)
        with atomic(out / target) as path:
            Image.fromarray(to_display(picture)).save(path, pnginfo=note)
        if progress:
            progress(len(taken), total)
    return len(taken)
