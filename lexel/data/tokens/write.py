"""Writing token sets: pictures turned into indices once, shard by shard; a stopped writer goes on.

A shard's .json is written after its .npy and `tokens.json` after all of them, each of them whole or not at all, so a
writer that was stopped goes on at the first shard that is missing.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lexel.checkpoint import atomic_write
from lexel.data.arrays import to_images
from lexel.data.batches import Squares, look_up, reading_processes
from lexel.data.captions import Captions, stored
from lexel.data.images import ImageSet
from lexel.data.tokens.format import (
    FORMAT,
    INDEX,
    MANIFEST_PARTIAL,
    OWN_GRIDS,
    VERSION,
    Manifest,
    digest,
    digest_of_names,
    features_path,
    find_manifest,
    index_dtype,
    read_manifest,
    read_shard_description,
    sealed,
    shard_path,
)
from lexel.data.tokens.layouts import described
from lexel.data.tokens.token_set import TokenSet
from lexel.data.transforms import Transform
from lexel.data.unreadable import check_unreadable
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback
from lexel.token_spec import TokenSpec

AT_ONCE = 256  # captions whose features are written together
SHOWN = 40  # characters of a value in an error
OPTIONAL = {"books": None, "grids": None, "caption_features": None}  # what a plan has for keys it does not name
NO_IDENTITY = {"provenance", "attribution"}  # of a plan: notes, in which two writers of the same tokens may differ

Layout = Callable[[int, int], TokenSpec]  # height and width in pixels to how the tokens lie


def write_tokens(
    folder: str | Path,
    images: ImageSet,
    transform: Transform | None,
    encode: Callable[[Tensor], Tensor],
    *,
    grid: Sequence[int] | None,
    codebook_size: int,
    books: int | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    fingerprint: str,
    crops: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    shard_size: int = 4096,
    rank: int = 0,
    processes: int = 1,
    workers: int | None = 0,
    provenance: dict[str, Any] | None = None,
    captions: Captions | None = None,
    layout: Layout | None = None,
    whole: Callable[[np.ndarray], Tensor] | None = None,
    most_pixels: int | None = None,
    tiles: tuple[int, int] | None = None,
    max_unreadable: float = 1.0,
    progress: ProgressCallback | None = None,
) -> "TokenSet | None":
    """Encodes a set of images into a folder; the same call again goes on where it was stopped.

    Several processes may write one folder, each its share of the shards; the last to finish completes it. What is
    written does not depend on their number, nor on interruptions.

    Args:
        folder: new, or begun by the same call before.
        images: the set; unreadable pictures are left out and their reasons kept in `TokenSet.unreadable`.
        transform: resizes and crops images; None encodes each in its own size, one by one.
        encode: images (B, 3, H, W) in [-1, 1] to int64 indices (B, *grid).
        grid: shape of an image's indices: (h, w), or (Q, h, w) for residual and product codes; None where each image
            has its own, as `layout` says.
        codebook_size: indices lie below it.
        books: codebooks a cell, the first axis of `grid`; None where a cell has one index.
        grids: of each scale or level, where `grid` is the flat layout of several.
        fingerprint: of the tokenizer; readers can ask for it.
        crops: versions of each picture. The first is the centred one; the others are random, and a function of
            (seed, version, number of the picture).
        seed: of the random versions.
        batch_size: pictures encoded together.
        shard_size: pictures in a shard; what an interruption can cost.
        rank, processes: this process, of how many.
        workers: processes that read pictures; 0 reads them here, None takes as many as pay.
        provenance: anything more to keep, as JSON.
        captions: features of a caption for each image, kept as float16 beside the tokens.
        layout: height and width of an image to how its tokens lie, where there is no transform; a size that does not
            fit raises UsageError, and that image is left out.
        whole: pixels (1, H, W, C), which may lie in a file, to indices, where there is no transform; by default
            `encode` of the images.
        most_pixels: the largest image that `layout` takes: a set of another limit is another set.
        tiles: side and overlap of the tiles in which `encode` and `whole` take images, for they change the tokens.
        max_unreadable: the part of this process's pictures that may be unreadable before that is an error; what is
            written until then stays.
        progress: called with (pictures done, pictures of this process).

    Returns:
        The set; None if other processes have not finished their shards.

    Raises:
        UsageError: the folder holds something else, too many pictures are unreadable, or `encode` gave other shapes or
            indices than announced.
    """
    folder = Path(folder)
    for name, value in (("codebook_size", codebook_size), ("crops", crops), ("shard_size", shard_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < processes:
        raise UsageError(f"rank must lie in [0, {processes}) for {processes} processes, got {rank}")
    if captions is not None and len(captions) != len(images):
        raise UsageError(f"there are features of {len(captions)} captions for {len(images)} images")
    if (grid is None) != (transform is None) or (grid is None) != (layout is not None):
        raise UsageError("images in their own sizes need a layout, and neither a transform nor a grid")
    if grid is None and crops != 1:
        raise UsageError(f"images in their own sizes are not cropped: crops must be 1, got {crops}")
    if grid is None:
        batch_size, how = 1, f"whole {most_pixels}"
    else:
        assert transform is not None
        how = f"{type(transform).__name__} {transform.size}"
    if tiles is not None:
        how += f", tiles of {tiles[0]} that overlap by {tiles[1]}"
    plan: dict[str, Any] = {
        "format": FORMAT,
        "version": OWN_GRIDS if grid is None else VERSION,
        "grid": None if grid is None else list(grid),
        "codebook_size": codebook_size,
        "dtype": index_dtype(codebook_size).name,
        "crops": crops,
        "seed": seed,
        "fingerprint": fingerprint,
        "transform": how,
        "images": len(images),
        "names": digest_of_names(images.names),
        "shard_size": shard_size,
        "classes": images.classes,
        "labelled": images.labels is not None,
        "attribution": images.attribution,
        "provenance": provenance,
        **({} if books is None else {"books": books}),
        **({} if grids is None else {"grids": [list(each) for each in grids]}),
        **({} if captions is None else {"caption_features": _layout(captions)}),
    }
    plan = json.loads(json.dumps(plan))  # as it will be read back: a tuple has become a list
    manifest = begin(folder, plan)
    shards = range(-(-len(images) // shard_size))
    mine = shards_of(len(images), shard_size, rank, processes)
    take = whole or (lambda pixels: encode(to_images(pixels)))
    shaped = None if layout is None else _Whole(layout, take)
    done, total = 0, sum(len(numbers) for numbers in mine.values())
    unreadable: dict[str, str] = {}

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    readers = reading_processes(workers, images, transform)
    for shard, numbers in mine.items():
        if shard_path(folder, shard, ".json").is_file():  # written before an interruption
            read(len(numbers))
            unreadable |= read_shard_description(shard_path(folder, shard, ".json"), manifest).unreadable
        else:
            versions = Squares(images, transform, numbers, batch_size, crops=crops, seed=seed)
            unreadable |= _write_shard(folder, shard, versions, encode, plan, readers, read, captions, shaped)
        check_unreadable(unreadable, total, max_unreadable)
    if not all(shard_path(folder, shard, ".json").is_file() for shard in shards):
        return None
    return complete(folder, plan)


def shards_of(images: int, shard_size: int, rank: int, processes: int) -> dict[int, range]:
    """The shards that a process writes, each with the numbers of its images."""
    shards = range(-(-images // shard_size))[rank::processes]
    return {shard: range(shard * shard_size, min((shard + 1) * shard_size, images)) for shard in shards}


def complete(folder: Path, plan: dict[str, Any]) -> TokenSet:
    """Makes a set of a folder in which every shard of a plan is."""
    with atomic_write(folder / INDEX) as file:
        file.write(sealed({**plan, "shards": -(-plan["images"] // plan["shard_size"])}, indent=2))
    (folder / MANIFEST_PARTIAL).unlink(missing_ok=True)
    return TokenSet.open(folder, verify="never")  # we wrote it a moment ago


def check_plan(
    found: dict[str, Any], plan: dict[str, Any], what: str, there: str = "there", here: str = "here"
) -> None:
    """Compares what a folder says of its tokens with a plan; notes may differ.

    Raises:
        UsageError: `what`, and the first difference.
    """
    for key, value in {**OPTIONAL, **plan}.items():
        if found.get(key) != value and key not in NO_IDENTITY:
            raise UsageError(
                f"{what} ({key}: {_unlike(found.get(key), value, there, here)}); give another folder or delete it"
            )


def begin(folder: Path, plan: dict[str, Any]) -> Manifest:
    """Makes the folder ours, or checks that it is ours already; what it says of its tokens."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give a folder for the tokens")
    if path := find_manifest(folder):
        manifest, found = read_manifest(path)
        check_plan(found, plan, f"{folder} holds tokens made in another way")
        return manifest
    # Another process may begin at this very moment: what it writes first is not foreign.
    ours = (".partial-", "shard-", MANIFEST_PARTIAL, INDEX)
    if folder.is_dir() and any(not path.name.startswith(ours) for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no tokens; give a new folder")
    with atomic_write(folder / MANIFEST_PARTIAL) as file:
        file.write(sealed(plan, indent=2))
    return read_manifest(folder / MANIFEST_PARTIAL)[0]


def _unlike(first: Any, second: Any, there: str, here: str) -> str:
    """Two values that differ, cut so that the difference can be seen."""
    texts = [" ".join(str(value).split()) for value in (first, second)]
    start = next((at for at, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), min(map(len, texts)))
    if max(map(len, texts)) > SHOWN and start > SHOWN // 2:
        texts = ["..." + text[start - SHOWN // 4 :] for text in texts]
    texts = [text if len(text) <= SHOWN else text[:SHOWN] + "..." for text in texts]
    return f"{texts[0]} {there}, {texts[1]} {here}"


def _write_shard(
    folder: Path,
    shard: int,
    versions: Squares,
    encode: Callable[[Tensor], Tensor],
    plan: dict[str, Any],
    workers: int,
    read: Callable[[int], None],
    captions: Captions | None,
    whole: "_Whole | None",
) -> dict[str, str]:
    """Writes a shard; the reasons of its unreadable pictures, by name."""
    images = versions.images
    unreadable: dict[str, str] = {}
    readable: list[int] = []
    encoded = [np.empty(0 if whole else (0, plan["crops"], *plan["grid"]), plan["dtype"])]
    layouts: list[TokenSpec] = []
    sizes: list[tuple[int, int]] = []
    for pictures in look_up(versions, range(len(versions)), workers):
        unreadable.update(pictures.unreadable)
        if whole and pictures.numbers:
            height, width = pictures.arrays.shape[1:3]
            reason, spec = whole.layout_of(height, width)
            if spec is None:
                unreadable[images.names[pictures.numbers[0]]] = reason
                read(1)
                continue
            encoded.append(_checked(whole.encode(pictures.arrays), (1, *spec.shape), plan).ravel())
            layouts.append(spec)
            sizes.append((height, width))
        elif pictures.numbers:
            encoded.append(_encode(pictures.arrays, len(pictures.numbers), encode, plan, versions.batch_size))
        readable += pictures.numbers
        read(len(pictures.numbers) + len(pictures.unreadable))
    written = write_indices(shard_path(folder, shard, ".npy"), np.concatenate(encoded))
    facts: dict[str, Any] = {
        "names": [images.names[number] for number in readable],
        "labels": None if images.labels is None else [images.labels[number] for number in readable],
        "unreadable": unreadable,
        **written,
        **(described(layouts, sizes) if whole else {}),
    }
    if images.captions is not None:
        facts["captions"] = [images.captions[number] for number in readable]
    if captions is not None:
        facts["caption_features"] = _write_features(features_path(folder, shard), captions, readable)
    with atomic_write(shard_path(folder, shard, ".json")) as file:
        file.write(sealed(facts))
    return unreadable


def write_indices(path: Path, indices: np.ndarray) -> dict[str, Any]:
    """Writes a shard's indices (rows, crops, *grid), and says what is in the file."""
    buffer = io.BytesIO()
    np.save(buffer, indices)
    content = buffer.getbuffer()
    with atomic_write(path) as file:
        file.write(content)
    return {"sha256": digest(content), "bytes": content.nbytes}


def _layout(captions: Captions) -> dict[str, Any]:
    """The part of `tokens.json` about caption features."""
    return {"length": captions.length, "channels": captions.channels, "fingerprint": captions.fingerprint()}


def _write_features(path: Path, captions: Captions, numbers: Sequence[int]) -> dict[str, Any]:
    """Writes the features of a shard's captions part by part, and says what is in the file."""

    def parts() -> Iterator[bytes]:
        header = io.BytesIO()
        shape = (len(numbers), captions.length, captions.channels)
        np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
        yield header.getvalue()
        for first in range(0, len(numbers), AT_ONCE):
            yield stored(captions, numbers[first : first + AT_ONCE]).astype("<f2").tobytes()

    hasher, size = hashlib.sha256(), 0
    with atomic_write(path) as file:
        for part in parts():
            file.write(part)
            hasher.update(part)
            size += len(part)
    return {"sha256": hasher.hexdigest(), "bytes": size}


def _encode(
    squares: np.ndarray, count: int, encode: Callable[[Tensor], Tensor], plan: dict[str, Any], batch_size: int
) -> np.ndarray:
    """Tokens (count, crops, *grid) of squares (count * crops, size, size, 3), never more than batch_size at once."""
    parts = []
    for first in range(0, len(squares), batch_size):
        images = to_images(squares[first : first + batch_size])
        parts.append(_checked(encode(images), (len(images), *plan["grid"]), plan))
    return np.concatenate(parts).reshape(count, plan["crops"], *plan["grid"])


def _checked(tokens: Tensor, shape: tuple[int, ...], plan: dict[str, Any]) -> np.ndarray:
    """Indices (B, *grid), of the shape and in the range that were announced."""
    indices = tokens.cpu().numpy()
    if indices.shape != shape:
        raise UsageError(f"the tokenizer gave indices {indices.shape} for a grid of {shape[1:]}")
    if indices.min() < 0 or indices.max() >= plan["codebook_size"]:
        raise UsageError(
            f"the tokenizer gave indices from {indices.min()} to {indices.max()} for {plan['codebook_size']} codes"
        )
    return indices.astype(plan["dtype"])


class _Whole(NamedTuple):
    """Encoding of images in their own sizes."""

    layout: Layout
    encode: Callable[[np.ndarray], Tensor]  # pixels (1, H, W, C) to indices

    def layout_of(self, height: int, width: int) -> tuple[str, TokenSpec | None]:
        """The layout of an image's tokens; or None, and why it has none."""
        try:
            return "", self.layout(height, width)
        except UsageError as error:
            return str(error), None
