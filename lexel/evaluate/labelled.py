"""Tokens of labelled images for a probe: of token sets, or made of images, whole or in parts of the work."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexel.config import check
from lexel.data import ImageSet, first_reason, ordered_batches
from lexel.data.config import HELD_OUT, DataConfig, open_data
from lexel.data.images import digest
from lexel.data.tokens import TokenSet, write_tokens
from lexel.data.tokens.write import shards_of
from lexel.data.unreadable import check_unreadable
from lexel.errors import UsageError
from lexel.loading import own_transform
from lexel.parts import Part
from lexel.provenance import public_name
from lexel.runtime import Runtime
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer

StageCallback = Callable[[str, int, int | None], None]  # called with (stage, done, total)

Read = Callable[[np.ndarray], Tensor]  # numbers of images to their tokens

KEPT_TOGETHER = 1024  # images whose tokens are written together, about: what a stopped part loses


class Labelled(NamedTuple):
    """Tokens of images and the classes of the images."""

    read: Read  # int64 (B, *grid), or latents (B, D, *grid)
    labels: Tensor  # int64 (N,)
    classes: list[str]
    spec: TokenSpec
    made_by: str  # the tokenizer's fingerprint
    about: dict[str, Any]  # source, images, fingerprint
    unreadable: Mapping[str, str]  # images of the source that could not be used, with the reason

    def __len__(self) -> int:
        return len(self.labels)


def token_sets(
    source: str | Path | TokenSet, validation: str | Path | TokenSet | float | None, max_unreadable: float = 1.0
) -> tuple[Labelled, Labelled]:
    """Tokens to learn from and tokens to measure on, with one numbering of classes."""

    def opened(given: str | Path | TokenSet) -> TokenSet:
        tokens = given if isinstance(given, TokenSet) else TokenSet.open(given)
        _require_labels(tokens.labels, str(tokens.folder))
        check_unreadable(tokens.unreadable, len(tokens) + len(tokens.unreadable), max_unreadable)
        return tokens

    tokens = opened(source)
    if validation is None or isinstance(validation, float):
        training, measured = tokens.hold_out(HELD_OUT if validation is None else validation)
        return _of_set(training), _of_set(measured)
    measured = opened(validation)
    measured.require(tokens.fingerprint)
    if measured.token_spec != tokens.token_spec:
        raise UsageError(f"{measured.folder} has grids {measured.grid}, {tokens.folder} {tokens.grid}")
    if not len(measured):
        raise UsageError(f"{measured.folder} holds no images")
    return _of_set(tokens), _of_set(measured.with_classes(tokens.classes))


def _of_set(tokens: TokenSet) -> Labelled:
    assert tokens.labels is not None
    listed = [tokens.fingerprint, list(tokens.names), tokens.labels.tolist(), tokens.histogram().tolist()]
    about = {"source": public_name(tokens.folder), "images": len(tokens), "fingerprint": digest(listed)}
    labels = torch.from_numpy(tokens.labels)
    classes, made_by = list(tokens.classes), tokens.fingerprint
    return Labelled(tokens.tokens, labels, classes, tokens.token_spec, made_by, about, tokens.unreadable)


def _require_labels(labels: Any, source: str) -> None:
    if labels is None:
        raise UsageError(f"the images of {source} have no classes; a folder with a subfolder for each class has")


def images_as_tokens(
    source: str,
    validation: Any,
    tokenizer: Tokenizer,
    size: int | None,
    workers: int | None,
    pixel_limit: int,
    max_unreadable: float,
    batch_size: int,
    where: Runtime,
    report: StageCallback,
    warnings: list[str],
    resume: Path | None = None,
    part: Part | None = None,
) -> tuple[Labelled, Labelled] | int:
    """The tokens of images to learn from and to measure on, kept in memory, or as token sets in a folder `resume`.

    Of a part alone how many images it has: the others may not be there.
    """
    transform = own_transform(tokenizer, size)
    spec = tokenizer.token_spec(transform.size, transform.size)
    table = {
        "source": source,
        "validation": validation,
        "size": transform.size,
        "memory": 0.0,
        "pixel_limit": pixel_limit,
        "max_unreadable": max_unreadable,
        "channels": tokenizer.channels,
    }
    sets = open_data(check(table, DataConfig, "the images"))
    for images in sets:
        _require_labels(images.labels, source if images is sets[0] else str(validation or source))
    tokenizer.to(where.device).eval()
    made_by = tokenizer.fingerprint()
    shard_size = batch_size * max(1, KEPT_TOGETHER // batch_size)  # whole batches, as without files

    def encode(images: Tensor) -> Tensor:
        with where.autocast(), torch.no_grad():
            return tokenizer.encode(images.to(where.device)).cpu()

    def stored(images: ImageSet, folder: Path, part: Part) -> TokenSet | None:
        return write_tokens(
            folder,
            images,
            transform,
            encode,
            grid=spec.shape,
            codebook_size=spec.codebook_size,
            books=spec.books,
            grids=None if len(spec.grids) == 1 else spec.grids,
            fingerprint=made_by,
            batch_size=batch_size,
            shard_size=shard_size,
            rank=part.number - 1,
            processes=part.parts,
            workers=workers,
            max_unreadable=max_unreadable,
            progress=lambda done, total: report("encoding", done, total),
        )

    def encoded(images: ImageSet, name: str, folder: Path | None) -> Labelled:
        assert images.labels is not None
        if folder is not None:
            kept = stored(images, folder, Part(1, 1))
            assert kept is not None
            assert kept.labels is not None
            return as_labelled(images, name, kept.tokens, torch.from_numpy(kept.labels), kept.unreadable)
        batches = ordered_batches(images, transform, batch_size, workers=workers, max_unreadable=max_unreadable)
        parts, numbers = [], []
        for batch in batches:
            parts.append(encode(batch.images))
            numbers += batch.numbers.tolist()
            report("encoding", len(numbers), len(images))
        tokens = torch.cat(parts) if parts else torch.empty(0)
        labels = torch.tensor([images.labels[number] for number in numbers])
        return as_labelled(images, name, lambda chosen: tokens[torch.from_numpy(chosen)], labels, batches.unreadable)

    def as_labelled(images: ImageSet, name: str, read: Read, labels: Tensor, unreadable: Mapping[str, str]) -> Labelled:
        if unreadable:
            warnings.append(f"{len(unreadable)} images could not be read; {first_reason(unreadable)}")
        if not len(labels):
            raise UsageError(f"none of the {len(images)} images of {name} can be read; {first_reason(unreadable)}")
        about = {"source": public_name(name), "images": len(labels), "fingerprint": images.fingerprint()}
        return Labelled(read, labels, list(images.classes), spec, made_by, about, unreadable)

    training, measured = sets[0], sets[1].with_classes(sets[0].classes)
    if resume is not None and tokenizer.continuous:
        raise UsageError("continuous latents have no codes, and token sets hold codes: leave --resume and --part out")
    folders = [None, None] if resume is None else [resume / "training", resume / "validation"]
    if part is not None and resume is not None:
        count = 0
        for images, name in ((training, "training"), (measured, "validation")):
            stored(images, resume / name, part)
            count += sum(map(len, shards_of(len(images), shard_size, part.number - 1, part.parts).values()))
        return count
    return (
        encoded(training, source, folders[0]),
        encoded(measured, str(validation or source), folders[1]),
    )
