"""Codes as pictures: the patch each decodes to, how often it is used, its neighbours, and where it lies."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexel.data import to_images, to_uint8
from lexel.errors import UsageError
from lexel.report.figures import in_plane
from lexel.spacing import evenly_spaced
from lexel.studio import pictures
from lexel.studio.jobs import Job
from lexel.studio.models import Entry, Use
from lexel.tokenizer import Tokenizer

PAGE = 256  # codes of one page
NEIGHBOURS = 8
POINTS = 2000  # codes, and latents, on the map
BATCH = 64
LARGEST = 2**20  # codes that are sorted and listed


def use_of(entry: Entry) -> Use:
    """The histogram of an entry's codes: of its run's last validation, else over its examples.

    Raises:
        UsageError: it has no codes to count.
    """
    tokenizer = entry.tokenizer
    if tokenizer.continuous:
        raise UsageError(f"{entry.key} has no codebook: its tokens are continuous")
    if tokenizer.codebook_size > LARGEST:
        raise UsageError(f"{entry.key} has {tokenizer.codebook_size:,} codes; up to {LARGEST:,} are listed")
    with entry.lock:
        if entry.use is None:
            entry.use = _count(entry, tokenizer)
        return entry.use


def _count(entry: Entry, tokenizer: Tokenizer) -> Use:
    books, size = tokenizer.quantizer.books or 1, tokenizer.codebook_size
    run, counted = entry.run(), None
    kept = None if run is None or "histogram" not in run.last else run.last["histogram"].reshape(-1)
    if kept is not None and kept.size == books * size:
        counts = kept.reshape(books, size).astype(np.int64)
    else:
        indices = tokenizer.encode(to_images(entry.examples).to(entry.device)).cpu()
        rows = indices.movedim(1, 0) if tokenizer.quantizer.books else indices[None]
        counts = np.stack([torch.bincount(row.flatten(), minlength=size).numpy() for row in rows])
        counted = len(entry.examples)
    return Use(counts, np.argsort(-counts, axis=1, kind="stable"), counted)


def page(entry: Entry, number: int = 0, book: int = 0, order: str = "use", job: Job | None = None) -> dict[str, Any]:
    """One page of codes with their patches.

    Args:
        entry: the model.
        number: of the page, from 0.
        book: which codebook, where there are several.
        order: "use", "number" or "dead", which lists only codes that were never chosen.
        job: that this is; it can be stopped between batches of codes.

    Raises:
        UsageError: there is no such page or book.
    """
    use = use_of(entry)
    counts, sorted_codes = _row(use, book)
    if order not in ("use", "number", "dead"):
        raise UsageError(f"order must be use, number or dead, got {order[:40]!r}")
    codes = np.arange(len(counts)) if order == "number" else sorted_codes
    if order == "dead":
        codes = codes[counts[codes] == 0]
    pages = max(1, -(-len(codes) // PAGE))
    if not 0 <= number < pages:
        raise UsageError(f"there are {pages} pages, counted from 0; got {number}")
    chosen = codes[number * PAGE : (number + 1) * PAGE]
    shown: dict[str, Any] = {
        "codes": chosen.tolist(),
        "counts": counts[chosen].tolist(),
        "pages": pages,
        "page": number,
        "size": len(counts),
        "used": int((counts > 0).sum()),
        "tokens": int(counts.sum()),
        "pictures": use.pictures,
        "books": len(use.counts),
        "histogram": [int(v) for v in counts[sorted_codes][evenly_spaced(len(counts), min(len(counts), 400))]],
    }
    if len(chosen):
        shown["sheet"] = pictures.as_address(pictures.sheet(patches(entry, chosen, book, job)))
    return shown


def code(entry: Entry, number: int, book: int = 0) -> dict[str, Any]:
    """One code: its use, its rank, and the codes that lie nearest to it, with patches.

    Raises:
        UsageError: there is no such code.
    """
    use = use_of(entry)
    counts, sorted_codes = _row(use, book)
    if not 0 <= number < len(counts):
        raise UsageError(f"codes are 0 to {len(counts) - 1}, got {number}")
    table = _table(entry.tokenizer, book)
    distances = (table - table[number]).norm(dim=1)
    nearest = distances.argsort(stable=True)
    nearest = nearest[nearest != number][:NEIGHBOURS]
    chosen = np.array([number, *nearest.tolist()])
    return {
        "code": number,
        "count": int(counts[number]),
        "share": float(counts[number] / max(1, counts.sum())),
        "rank": int(np.flatnonzero(sorted_codes == number)[0]) + 1,
        "size": len(counts),
        "nearest": [
            {"code": int(other), "distance": round(float(distances[other]), 4), "count": int(counts[other])}
            for other in nearest
        ],
        "sheet": pictures.as_address(pictures.sheet(patches(entry, chosen, book), len(chosen))),
    }


def code_points(entry: Entry, book: int = 0, job: Job | None = None) -> dict[str, Any]:
    """Codes and latents of the examples on their two main axes, for a map."""
    job = job or Job()
    job.progress(0, 3)
    use = use_of(entry)
    job.progress(1, 3)
    counts, _ = _row(use, book)
    table = _table(entry.tokenizer, book).double()
    codes = evenly_spaced(len(table), min(len(table), POINTS))
    with torch.no_grad():
        z = entry.tokenizer.latents(to_images(entry.examples).to(entry.device)).double().cpu()
    job.progress(2, 3)
    latents = z.movedim(1, -1).flatten(0, -2) if z.shape[1] == table.shape[1] else table[:0]
    latents = latents[evenly_spaced(len(latents), min(len(latents), POINTS))]
    flat = in_plane(torch.cat([latents, table[codes]]).numpy())
    rounded = [[round(x, 4), round(y, 4)] for x, y in flat.tolist()]
    return {
        "latents": rounded[: len(latents)],
        "points": rounded[len(latents) :],
        "codes": codes,
        "counts": counts[codes].tolist(),
    }


@torch.no_grad()
def patches(entry: Entry, codes: np.ndarray, book: int, job: Job | None = None) -> np.ndarray:
    """Pictures of codes, uint8 (N, h, w, C): the middle of a decoded grid that is filled with the code.

    Where a token has no place in the picture, the whole picture that the code alone makes.
    """
    tokenizer, size = entry.tokenizer, entry.transform.size
    quantizer, spec = tokenizer.quantizer, tokenizer.token_spec(size, size)
    factor = tokenizer.downsampling if len(spec.grids) == 1 and len(spec.grids[0]) == 2 else None
    grid: tuple[int, ...] = tokenizer.grid(size, size) if factor is None else (3, 3)
    try:
        tokenizer.image_size(grid)
    except UsageError:  # an autoencoder of one size
        grid = tokenizer.grid(size, size)
    shape = quantizer.index_shape(grid)
    filled = torch.zeros(len(codes), *shape, dtype=torch.long)
    wanted = torch.from_numpy(np.asarray(codes)).view(-1, *[1] * (len(shape)))
    if quantizer.books is None:
        filled += wanted
    else:  # the other books hold their most used code
        use = use_of(entry)
        for other in range(quantizer.books):
            filled[:, other] = wanted[:, 0] if other == book else int(use.order[other, 0])
    images: list[Tensor] = []
    for part in filled.split(BATCH):
        if job is not None:
            job.progress(BATCH * len(images), len(filled))
        images.append(tokenizer.decode(part.to(entry.device)).cpu())
    made = to_uint8(torch.cat(images))
    if factor is None:
        return made
    top, left = grid[0] // 2 * factor, grid[1] // 2 * factor
    return made[:, top : top + factor, left : left + factor]


def _row(use: Use, book: int) -> tuple[np.ndarray, np.ndarray]:
    if not 0 <= book < len(use.counts):
        raise UsageError(f"books are 0 to {len(use.counts) - 1}, got {book}")
    return use.counts[book], use.order[book]


@torch.no_grad()
def _table(tokenizer: Tokenizer, book: int) -> Tensor:
    """The codes of a book, (K, D)."""
    table = tokenizer.quantizer.codebook.detach().float().cpu()
    return table if table.dim() == 2 else table[min(book, len(table) - 1)]
