"""What a tokenizer under training is measured by, on pictures it does not learn from."""

from typing import NamedTuple

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

from lexel.data import ImageSet, Transform, ordered_batches, to_uint8
from lexel.data.batches import OnError
from lexel.losses import LPIPS
from lexel.metrics.health import CodeHistogram, gradient_health
from lexel.metrics.pixels import psnr
from lexel.runtime import Runtime
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer
from lexel.train.run import share

SHOWN = 8  # pictures in a snapshot, and for the gradient's health
SAMPLED = 2048  # latents, and codes, in a snapshot at most


class Measured(NamedTuple):
    """The numbers of a validation line, and the tensors of a snapshot."""

    values: dict[str, float | None]
    snapshot: dict[str, Tensor]
    unreadable: dict[str, str]  # pictures of this process's share that were left out, and why


@torch.no_grad()
def validate(
    tokenizer: Tokenizer,
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    runtime: Runtime,
    accelerator: Accelerator,
    limit: int | None = None,
    lpips: LPIPS | None = None,
    workers: int = 0,
    on_error: OnError = "replace",
) -> Measured:
    """Measures a tokenizer in evaluation mode; every process must call, and all get the same numbers.

    Args:
        tokenizer: in evaluation mode.
        images: to measure on.
        transform: makes squares of them.
        batch_size: images a batch, of each process.
        runtime: device and precision.
        accelerator: tells the processes.
        limit: measure on so many images only, evenly spaced.
        lpips: measures perceptual distance too.
        workers: processes that read pictures.
        on_error: "stop" raises for an unreadable picture instead of leaving it out.
    """
    if limit is not None and limit < len(images):
        images = images.subset(evenly_spaced(len(images), limit))
    quantizer = tokenizer.quantizer
    histogram = CodeHistogram(quantizer.codebook_size, getattr(quantizer, "books", None), runtime.device)
    names = ["images", "l1", "psnr", "quantization_error", "latent_norm", *(["lpips"] if lpips is not None else [])]
    sums = [0.0] * len(names)  # each but the first: the mean of a batch times its images
    batches = ordered_batches(
        images, transform, batch_size, accelerator.process_index, accelerator.num_processes, workers, on_error=on_error
    )
    for batch in batches:
        pictures = batch.images.to(runtime.device)
        with runtime.autocast():
            z = tokenizer.latents(pictures)
            indices = quantizer.assign(z)
            z_q = quantizer.indices_to_codes(indices)
            made = tokenizer.decode_codes(z_q).clamp(-1, 1)
        histogram.add(indices)
        means = [
            1.0,
            (made - pictures).abs().mean(),
            psnr(pictures, made).mean(),
            (z_q - z).square().mean(),
            z.norm(dim=1).mean(),
            *([lpips(made, pictures).mean()] if lpips is not None else []),
        ]
        sums = [total + len(pictures) * float(mean) for total, mean in zip(sums, means, strict=True)]
    histogram.all_reduce()
    count, *totals = share(sums, accelerator, runtime.device)
    values: dict[str, float | None] = {name: total / count for name, total in zip(names[1:], totals, strict=True)}

    # A handful of pictures, the same in every process, for what needs gradients and for the eye.
    few = images.subset(evenly_spaced(len(images), SHOWN))
    shown = next(iter(ordered_batches(few, transform, len(few)))).images.to(runtime.device)
    with runtime.autocast():
        health = gradient_health(tokenizer, shown)
        z = tokenizer.latents(shown)
        indices = quantizer.assign(z)
        made = tokenizer.decode_codes(quantizer.indices_to_codes(indices))
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
    snapshot = {
        "originals": torch.from_numpy(to_uint8(shown)),
        "reconstructions": torch.from_numpy(to_uint8(made)),
        "indices": indices,
        "histogram": histogram.counts.sum(0),
        "latents": _sample(z.float().movedim(1, -1).flatten(0, -2)),
        "codes": _sample(codes),
    }
    plain = {name: tensor.cpu().contiguous() for name, tensor in snapshot.items()}
    return Measured(values, plain, batches.unreadable)


def _sample(rows: Tensor) -> Tensor:
    """At most SAMPLED rows, evenly spaced."""
    stride = -(-len(rows) // SAMPLED)
    return rows[::stride]
