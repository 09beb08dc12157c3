"""Validation of a tokenizer under training, on images it does not learn from."""

from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.data import Batch, ImageSet, Transform, ordered_batches, to_uint8
from lexel.data.batches import OnError
from lexel.data.files import UnreadableImage
from lexel.errors import UsageError
from lexel.losses import LPIPS
from lexel.metrics.health import CodeHistogram, gradient_health
from lexel.metrics.pixels import psnr
from lexel.quantizers.continuous import Continuous
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer
from lexel.train.processes import Processes

SHOWN = 8  # images in a snapshot, and for the gradient's health
SAMPLED = 2048  # latents, and codes, in a snapshot at most


class ValidationResult(NamedTuple):
    """The numbers of a validation line, and the tensors of a snapshot."""

    values: dict[str, float | None]
    snapshot: dict[str, Tensor]
    unreadable: dict[str, str]  # images of this process's share that were left out, and why


@torch.no_grad()
def validate(
    tokenizer: Tokenizer,
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    processes: Processes,
    limit: int | None = None,
    lpips: LPIPS | None = None,
    workers: int = 0,
    on_error: OnError = "replace",
) -> ValidationResult:
    """Measures a tokenizer in evaluation mode; every process must call, and all get the same numbers.

    Continuous latents have reconstructions and no codes: usage, perplexity and the like are left out.

    Args:
        tokenizer: in evaluation mode.
        images: to measure on; at least one can be read.
        transform: resizes and crops them.
        batch_size: images a batch, of each process.
        processes: this process and those beside it.
        limit: measure on so many images only, evenly spaced.
        lpips: measures perceptual distance too.
        workers: processes that read images.
        on_error: "stop" raises for an unreadable image instead of taking another.
    """
    quantizer, runtime = tokenizer.quantizer, processes.runtime
    histogram = None
    if not isinstance(quantizer, Continuous):
        histogram = CodeHistogram(quantizer.codebook_size, getattr(quantizer, "books", None), runtime.device)
    names = ["images", "l1", "psnr", "quantization_error", "latent_norm", *(["lpips"] if lpips is not None else [])]
    sums = torch.zeros(len(names), dtype=torch.float64)
    unreadable: dict[str, str] = {}
    rank, count = processes.rank, processes.count
    for batch in readable_batches(images, transform, batch_size, limit, rank, count, workers, on_error, unreadable):
        originals = batch.images.to(runtime.device)
        with runtime.autocast():
            z = tokenizer.latents(originals)
            indices, z_q = _quantized(tokenizer, z)
            reconstructions = tokenizer.decode_codes(z_q).clamp(-1, 1)
        if histogram is not None:
            histogram.add(indices)
        means = [
            (reconstructions - originals).abs().mean(),
            psnr(originals, reconstructions).mean(),
            (z_q - z).square().mean(),
            z.norm(dim=1).mean(),
            *([lpips(reconstructions, originals).mean()] if lpips is not None else []),
        ]
        sums += len(originals) * torch.tensor([1.0, *(float(mean) for mean in means)], dtype=torch.float64)
    total, *totals = processes.reduce(list(sums), "sum")
    values: dict[str, float | None] = {name: each / total for name, each in zip(names[1:], totals, strict=True)}

    # A handful of images, the same in every process, for the gradient and the snapshot.
    few = readable_batches(images, transform, SHOWN, SHOWN, 0, 1, 0, on_error, {})
    shown = torch.cat([batch.images for batch in few]).to(runtime.device)
    with runtime.autocast():
        z = tokenizer.latents(shown)
        indices, z_q = _quantized(tokenizer, z)
        reconstructions = tokenizer.decode_codes(z_q)
    snapshot = {
        "originals": torch.from_numpy(to_uint8(shown)),
        "reconstructions": torch.from_numpy(to_uint8(reconstructions)),
        "latents": _sample(z.float().movedim(1, -1).flatten(0, -2)),
    }
    if histogram is None:
        del values["quantization_error"]
    else:
        histogram.all_reduce()
        with runtime.autocast():
            health = gradient_health(tokenizer, shown)
        codes = quantizer.codebook.detach().float().flatten(0, -2)
        values |= {
            "usage": histogram.usage,
            "perplexity": histogram.perplexity,
            "dead_codes": histogram.dead,
            "tokens": float(histogram.counts[0].sum()),
            "softmax_perplexity": health.softmax_perplexity,
            "gradient_ratio": health.ratio,
            "gradient_cosine": health.cosine,
            "code_norm": float(codes.norm(dim=1).mean()),
        }
        snapshot |= {"indices": indices, "histogram": histogram.counts.sum(0), "codes": _sample(codes)}
    plain = {name: tensor.cpu().contiguous() for name, tensor in snapshot.items()}
    return ValidationResult(values, plain, unreadable)


def _quantized(tokenizer: Tokenizer, z: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and quantized latents of z; continuous latents pass as they are."""
    quantizer = tokenizer.quantizer
    if isinstance(quantizer, Continuous):
        return quantizer(z).indices, z
    indices = quantizer.assign(z)
    return indices, quantizer.indices_to_codes(indices)


def readable_batches(
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    limit: int | None,
    rank: int,
    processes: int,
    workers: int,
    on_error: OnError,
    unreadable: MutableMapping[str, str],
) -> Iterator[Batch]:
    """This process's share of at most `limit` images, evenly spaced over a set.

    An unreadable image gives its place to the next readable one before the following place, so that which images are
    measured depends on the set alone. The reasons of unreadable ones are added to `unreadable`, by name.
    """
    places = evenly_spaced(len(images), limit)
    ends = dict(zip(places, [*places[1:], len(images)], strict=True))
    wanted = {place: place for place in places[rank::processes]}  # the image that stands at a place
    while wanted:
        chosen = images.subset(list(wanted.values()))
        batches = ordered_batches(chosen, transform, batch_size, 0, 1, workers, on_error=on_error)
        yield from batches
        unreadable.update(batches.unreadable)
        wanted = {
            place: number + 1
            for place, number in wanted.items()
            if images.names[number] in batches.unreadable and number + 1 < ends[place]
        }


def require_readable(images: ImageSet) -> None:
    """Refuses a set in which not one image can be read.

    Raises:
        UsageError: with the reason of the first.
    """
    first: UnreadableImage | None = None
    for number in range(len(images)):
        try:
            images.read(number)
            return
        except UnreadableImage as error:
            first = first or error
    reason = f"; the first, {first.name}: {first.reason}" if first is not None else ""
    raise UsageError(f"none of the {len(images)} validation images can be read{reason}")


def _sample(rows: Tensor) -> Tensor:
    """At most SAMPLED rows, evenly spaced."""
    stride = -(-len(rows) // SAMPLED)
    return rows[::stride]
