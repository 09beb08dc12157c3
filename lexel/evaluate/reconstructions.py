"""Evaluation of tokenizers by their reconstructions of real images."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from lexel.data import ImageSet
from lexel.distributed import join
from lexel.errors import UsageError
from lexel.evaluate.features import Networks
from lexel.evaluate.measure import Options, build_metrics, identity_of, measure, part_measured, results_of
from lexel.evaluate.metric import Batch, Context, SamplePlan
from lexel.evaluate.metrics import wanted
from lexel.evaluate.references import Originals
from lexel.evaluate.results import as_result
from lexel.evaluate.rules import find_protocol
from lexel.evaluate.sources import ImageTokenizer, Pictures, on_device, open_set, resized, transform_of
from lexel.evaluate.stream import discard_partial
from lexel.memory import check_memory
from lexel.metrics import Protocol
from lexel.runtime import exact_float32, runtime
from lexel.spacing import evenly_spaced
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer


def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    source: str | Path | ImageSet,
    protocol: str | Protocol = "lexel",
    *,
    split: str | None = None,
    size: int | Literal["native"] | None = None,
    metrics: Sequence[str] | None = None,
    network: str | None = None,
    weights: str | Path | None = None,
    options: Options | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measures a tokenizer by its reconstructions of real images.

    Under torch.distributed every process calls it with the same arguments, and gets the same result.

    Args:
        tokenizer: images to indices and back: a `lexel.Tokenizer`, or anything with `encode`, `decode`, `token_spec`
            and `fingerprint`.
        source: the real images: a folder, the name of an embedded set, or an ImageSet.
        protocol: a key of `lexel.evaluate.PROTOCOLS`, or a Protocol of your own.
        split: of the source, if it has any.
        size: pixels a side; "native" takes whole images one by one, padded to a size that fits and cropped back. By
            default the size that the tokenizer was trained at, as its provenance says, else the protocol's.
        metrics: keys of `lexel.evaluate.METRICS`; the protocol's `reconstruction` metrics by default. What cannot be
            measured is left out with a warning.
        network: feature network for Fréchet distance and class scores. By default the protocol's, if its weights are
            given or at hand, else `efficientnet_lite0` (and the numbers are named so).
        weights: the network's published weights file.
        options: batch size, device and so on.
        changes: fields of `Options` by name: `evaluate_tokenizer(t, "photos", batch_size=8, device="cpu")`.

    Returns:
        A result of plain data: `metrics` by name, `intervals` for those that have one, `warnings`, and what is needed
        to compare it with another (`protocol`, `network`, `data`, `versions`, ...).

    Raises:
        UsageError: the source, the protocol, the network or the partial state does not fit, or nothing can be measured.
    """
    started = time.monotonic()
    options = (options or Options()).changed(changes)
    if size is None:
        size = getattr(tokenizer, "provenance", {}).get("size")
    chosen = resized(find_protocol(protocol), size)
    classes = wanted(chosen.reconstruction if metrics is None else metrics)
    where = runtime(join(options.device), options.precision)
    if chosen.size and isinstance(tokenizer, Tokenizer):
        check_memory(tokenizer, where, chosen.size, chosen.size, options.batch_size)
    channels = channels_of(tokenizer)
    images = open_set(source, split, chosen.size or None, channels, options.pixel_limit, options.max_unreadable)
    numbers = evenly_spaced(len(images), options.limit)
    real = Pictures(images, chosen, transform_of(chosen), options.workers, numbers)
    tokenizer = on_device(tokenizer, where.device)
    with exact_float32(where.device.type):
        spec = tokenizer.token_spec(*_size(tokenizer, real))
        context = Context(
            protocol=chosen,
            plan=SamplePlan.of(len(real), chosen),
            size=real.size,
            device=where.device,
            paired=True,
            **describe(tokenizer, spec),
            sorted_by_class=real.sorted_by_class,
        )
        networks = Networks(chosen, network, weights, where.device)
        warnings: list[str] = []
        built = build_metrics(classes, context, networks, warnings)
        warnings = [*networks.warnings, *warnings]
        whole = options.part is None  # a part takes the statistics of its originals, for the whole to have them all
        originals = Originals(built, real, chosen, warnings) if options.cache and whole else None

        def reconstructed(images: Tensor, numbers: Tensor) -> Batch:
            images = images.to(where.device)
            with where.autocast():  # a square that does not fit is refused by the tokenizer
                return reconstruct(tokenizer, chosen, images, numbers, padded=size == "native")

        identity = identity_of("reconstruction", chosen, built, networks, real, options.precision)
        identity["tokenizer"] = tokenizer.fingerprint()
        visited = measure(real, built, reconstructed, options, identity)
        if options.part is not None:
            return part_measured(options.part, visited, warnings)
        if originals is not None:
            originals.give_back()
        values = results_of(built)
        discard_partial(options.resume)
    coded = context.codebook_size is not None
    tokens = {
        "length": spec.length,
        "codebook_size": context.codebook_size,
        "bits": spec.bits if coded else None,
    }
    return as_result({**identity, "tokens": tokens}, chosen, real, visited, values, warnings, where, started)


def channels_of(tokenizer: ImageTokenizer) -> int:
    """Channels of the images that are measured: 3, or 1 for a tokenizer of grey ones.

    Raises:
        UsageError: the tokenizer takes others; metrics and their networks see colours or grey.
    """
    channels = tokenizer.channels if isinstance(tokenizer, Tokenizer) else 3
    if channels not in (1, 3):
        raise UsageError(f"images of 1 or 3 channels can be evaluated, the tokenizer takes {channels}")
    return channels


def describe(tokenizer: ImageTokenizer, spec: TokenSpec) -> dict[str, Any]:
    """The options of `Context` for a tokenizer: its codes if it has any, and whether it shows its latents."""
    if isinstance(tokenizer, Tokenizer) and tokenizer.continuous:
        return {"latents": True}
    return {"codebook_size": spec.codebook_size, "books": spec.books, "latents": isinstance(tokenizer, Tokenizer)}


def reconstruct(
    tokenizer: ImageTokenizer, protocol: Protocol, images: Tensor, numbers: Tensor, padded: bool = False
) -> Batch:
    """Images (B, C, H, W) in [-1, 1] and what a tokenizer makes of them, as metrics take them.

    Args:
        tokenizer: on the images' device.
        protocol: says how images are padded.
        images: of a size that fits, unless they are to be padded.
        numbers: of the images, int64 (B,).
        padded: whether they are padded to a size that fits, and cropped back.

    Raises:
        UsageError: the size does not fit.
    """
    height, width = images.shape[-2:]
    given, top, left = pad(tokenizer, images, protocol.padding) if padded else (images, 0, 0)
    indices: Tensor | None
    if isinstance(tokenizer, Tokenizer):
        decoded, indices, latents, quantized = tokenizer.reconstruct(given)
        indices = None if tokenizer.continuous else indices
    else:
        indices, latents, quantized = tokenizer.encode(given), None, None
        decoded = tokenizer.decode(indices)
    decoded = decoded.float()[..., top : top + height, left : left + width]
    if decoded.shape != images.shape:
        raise UsageError(
            f"the tokenizer decodes {tuple(images.shape)} to {tuple(decoded.shape)}; give a size that fits it"
        )
    if images.shape[1] == 1:  # grey in three channels, as a grey file opened in colour: what networks take
        decoded, images = (side.expand(-1, 3, -1, -1) for side in (decoded, images))
    return Batch(protocol, numbers, decoded, images, indices, latents, quantized)


def pad(tokenizer: ImageTokenizer, images: Tensor, padding: str) -> tuple[Tensor, int, int]:
    """Images (B, 3, H, W) made larger to a size that fits the tokenizer, and where they lie in it: top and left.

    `edge` repeats the last row and column; `grey` puts zeros on all sides, the odd one at the bottom and right.
    """
    height, width = images.shape[-2:]
    more_rows, more_columns = (
        fitting - side for fitting, side in zip(_fitting(tokenizer, height, width), (height, width), strict=True)
    )
    if padding == "edge":
        return F.pad(images, (0, more_columns, 0, more_rows), mode="replicate"), 0, 0
    top, left = more_rows // 2, more_columns // 2
    return F.pad(images, (left, more_columns - left, top, more_rows - top)), top, left


def _fitting(tokenizer: ImageTokenizer, height: int, width: int) -> tuple[int, int]:
    fitting = getattr(tokenizer, "fitting_size", None)
    return (height, width) if fitting is None else fitting(height, width)


def _size(tokenizer: ImageTokenizer, real: Pictures) -> tuple[int, int]:
    """Height and width of the images as the tokenizer gets them; of the first one, where they are whole."""
    if real.size != (0, 0):
        return real.size
    height, width, _ = real.images.first_readable().shape
    return _fitting(tokenizer, height, width)
