"""A larger codebook out of a smaller one: the codes used most are split along the covariance of their latents
(as in Y. Linde, A. Buzo and R. Gray, IEEE Transactions on Communications 28, 1980).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lexel.codebooks.prune import origin
from lexel.data import Transform, ordered_batches
from lexel.errors import UsageError
from lexel.evaluate import Options
from lexel.evaluate.sources import open_set
from lexel.kernels import Similarity
from lexel.loading import find_run, own_transform
from lexel.memory import check_memory
from lexel.quantizers.base import as_vectors
from lexel.runtime import runtime
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer

WANTED = 64  # latents a code of the larger codebook, where the pictures give so many
HELD = 2**28  # numbers of latents in memory: 1 GiB
POWERS = 8  # steps of the power iteration that finds a cell's longest axis


class Split(NamedTuple):
    """Codes after splitting."""

    codes: Tensor  # (K', D)
    parents: Tensor  # int64 (K',): the old code that each comes from; the first K are 0 to K - 1


def grow(
    tokenizer: Tokenizer,
    codebook_size: int,
    source: str | Path,
    *,
    size: int | None = None,
    transform: str | None = None,
    split: str | None = None,
    options: Options | None = None,
) -> Tokenizer:
    """The same tokenizer with more codes, for training to go on from (`init.source`).

    Codes keep their numbers; what they are split into follows behind. Nothing else changes.

    Args:
        tokenizer: whose quantizer can grow.
        codebook_size: codes of the result, K'.
        source: pictures whose latents say which codes are used most, and how they spread.
        size, transform: of the squares cut from pictures; by default as the tokenizer was trained.
        split: of the pictures, if they have any.
        options: batch size, device, limit and so on.

    Raises:
        UsageError: the quantizer cannot grow, K' is not larger, or the pictures have too few latents.
    """
    options = options or Options()
    quantizer = tokenizer.quantizer
    if codebook_size <= tokenizer.codebook_size:
        raise UsageError(
            f"the codebook has {tokenizer.codebook_size:,} codes; --to must be more, got {codebook_size:,}"
        )
    unchanged = torch.arange(tokenizer.codebook_size)
    codebook = quantizer.codebook.detach()
    quantizer.grow(tokenizer.config.quantizer, unchanged, codebook)  # raises now where it cannot
    cut = own_transform(tokenizer, size, transform)
    latents, indices = gather_latents(tokenizer, codebook_size, source, cut, split, options)
    found = split_codes(latents, indices, codebook.float().cpu(), codebook_size, quantizer.similarity)
    recoded = quantizer.grow(tokenizer.config.quantizer, found.parents, found.codes.to(codebook))
    result = tokenizer.recoded(recoded)
    result.provenance = tokenizer.provenance | origin("grown_from", tokenizer)
    return result


def training_images(source: str | Path) -> str:
    """The images that a run was trained on, as its recipe names them.

    Raises:
        UsageError: it is no run, or its images are not named.
    """
    run = find_run(source)
    named = None if run is None else run.read_recipe().get("data", {}).get("source")
    if not isinstance(named, str):
        raise UsageError(f"{source} does not say what it was trained on; give images by --data DIR")
    return named


@torch.no_grad()
def gather_latents(
    tokenizer: Tokenizer,
    codebook_size: int,
    source: str | Path,
    transform: Transform,
    split: str | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Latents (N, D) of pictures, as codes are compared with them, and the codes they chose, int64 (N,).

    Pictures are evenly spaced over the source, as many as give WANTED latents a code, if so many fit into memory.
    """
    where = runtime(options.device, options.precision)
    check_memory(tokenizer, where, transform.size, transform.size, options.batch_size)
    tokenizer = tokenizer.to(where.device).eval()
    quantizer = tokenizer.quantizer
    images = open_set(source, split, transform.size, tokenizer.channels, options.pixel_limit, options.max_unreadable)
    a_picture = tokenizer.token_spec(transform.size, transform.size).length
    rows = min(WANTED * codebook_size, HELD // quantizer.codebook_dim)
    count = min(len(images), options.limit or len(images), max(1, -(-rows // a_picture)))
    chosen = images.subset(list(evenly_spaced(len(images), count)))
    latents, indices = [], []
    budget = options.max_unreadable
    batches = ordered_batches(chosen, transform, options.batch_size, workers=options.workers, max_unreadable=budget)
    for batch in batches:
        with where.autocast():
            z = tokenizer.latents(batch.images.to(where.device))
        indices.append(quantizer.assign(z).flatten().cpu())
        latents.append(as_vectors(quantizer.as_compared(z)).float().cpu())
        if options.progress is not None:
            options.progress(sum(map(len, indices)) // a_picture, count)
    found = sum(map(len, indices))
    if found < 2 * codebook_size:
        raise UsageError(
            f"{source} gives {found:,} latents for {codebook_size:,} codes; at least two a code are needed, better "
            f"{WANTED}: give more pictures or a smaller --to"
        )
    return torch.cat(latents), torch.cat(indices)


@torch.no_grad()
def split_codes(latents: Tensor, indices: Tensor, codes: Tensor, size: int, similarity: Similarity = "l2") -> Split:
    """Splits the codes chosen most often in two, again and again, until there are `size`.

    A code's latents are cut by a plane through their mean, at right angles to the longest axis of their covariance;
    each half's mean is a code. Where codes are compared by direction ("dot", "cosine") the axis is at right angles to
    the mean, and only the part of the code along the mean turns to those of the halves: what else a code holds, which
    these latents do not see, is the decoder's, and a code that grew would win the latents of its neighbours.

    Args:
        latents: (N, D), as codes are compared with them.
        indices: int64 (N,), the code that each latent chose.
        codes: (K, D)
        size: of the result, K' > K.
        similarity: how codes are chosen.

    Raises:
        UsageError: too few codes have two latents that differ.
    """
    indices = indices.clone()
    parents = torch.arange(len(codes))
    spent = torch.zeros(len(codes), dtype=torch.bool)  # latents of these are all alike
    while len(codes) < size:
        counts = indices.bincount(minlength=len(codes)).masked_fill(spent, 0)
        largest = int(counts.max())
        if largest < 2:
            raise UsageError(
                f"only {len(codes):,} of {size:,} codes can be told apart by these pictures' latents; give more "
                "pictures or a smaller --to"
            )
        # The most used ones, down to half of the largest, so that none is split before one used twice as often.
        ready = (counts >= max(2, (largest + 1) // 2)).nonzero().flatten()
        ready = ready[counts[ready].argsort(descending=True, stable=True)][: size - len(codes)]
        place = torch.full((len(codes),), -1).index_put((ready,), torch.arange(len(ready)))
        rows = (place[indices] >= 0).nonzero().flatten()
        low, high, above = halves(latents[rows], place[indices[rows]], len(ready), similarity)
        if similarity in ("dot", "cosine"):
            mean = normalize(cell_means(latents[rows], place[indices[rows]], len(ready)), dim=1)
            along = (codes[ready] * mean).sum(1, keepdim=True)
            low, high = (codes[ready] + along * (normalize(half, dim=1) - mean) for half in (low, high))
        sizes = torch.zeros(len(ready), dtype=torch.int64).index_add_(0, place[indices[rows]], above.long())
        split = (sizes > 0) & (sizes < counts[ready])
        spent[ready[~split]] = True
        number = torch.full((len(ready),), -1).index_put((split,), len(codes) + torch.arange(int(split.sum())))
        moved = above & split[place[indices[rows]]]
        indices[rows[moved]] = number[place[indices[rows[moved]]]]
        codes = codes.index_copy(0, ready[split], low[split].to(codes))
        codes = torch.cat([codes, high[split].to(codes)])
        parents = torch.cat([parents, parents[ready[split]]])
        spent = torch.cat([spent, torch.zeros(int(split.sum()), dtype=torch.bool)])
    return Split(codes, parents)


def halves(latents: Tensor, cell: Tensor, cells: int, similarity: Similarity) -> tuple[Tensor, Tensor, Tensor]:
    """The means (cells, D) of both halves of each cell, and which latents (N,) lie in the second.

    Args:
        latents: (N, D)
        cell: int64 (N,) in [0, cells), each with a latent at least.
        cells: how many.
        similarity: how codes are chosen.
    """
    mean = cell_means(latents, cell, cells)
    centred = latents - mean[cell]
    if similarity in ("dot", "cosine"):  # what differs in length only cannot be told apart
        unit = normalize(mean, dim=1)[cell]
        centred = centred - (centred * unit).sum(1, keepdim=True) * unit
    side = (centred * longest_axis(centred, cell, cells)[cell]).sum(1) > 0
    half = cell_means(latents, 2 * cell + side, 2 * cells).view(cells, 2, -1)
    return half[:, 0], half[:, 1], side


def longest_axis(centred: Tensor, cell: Tensor, cells: int) -> Tensor:
    """The first principal axis (cells, D) of each cell's centred latents (N, D), without a D x D matrix a cell."""
    # The latent farthest from its mean lies along no other axis alone: a start that needs no random numbers.
    far = centred.square().sum(1)
    farthest = torch.zeros(cells).scatter_reduce_(0, cell, far, "amax")
    first = torch.full((cells,), len(cell)).scatter_reduce_(
        0, cell, torch.arange(len(cell)).masked_fill(far < farthest[cell], len(cell)), "amin"
    )
    axis = normalize(centred[first], dim=1)
    for _ in range(POWERS):
        along = (centred * axis[cell]).sum(1, keepdim=True)
        axis = normalize(torch.zeros_like(axis).index_add_(0, cell, along * centred), dim=1)
    return axis


def cell_means(latents: Tensor, cell: Tensor, cells: int) -> Tensor:
    """The mean (cells, D) of the latents (N, D) of each cell; 0 where a cell has none."""
    sums = torch.zeros(cells, latents.shape[1], dtype=latents.dtype).index_add_(0, cell, latents)
    return sums / cell.bincount(minlength=cells).clamp_min(1)[:, None].to(latents)
