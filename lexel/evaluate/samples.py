"""Evaluation of generated images against real ones."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lexel.data import ImageSet
from lexel.data.tokens import TokenSet
from lexel.distributed import join
from lexel.errors import UsageError
from lexel.evaluate.features import Networks
from lexel.evaluate.measure import Options, build_metrics, identity_of, measure, part_measured, results_of
from lexel.evaluate.metric import Batch, Context, SamplePlan
from lexel.evaluate.metrics import wanted
from lexel.evaluate.references import fingerprint_of, reference_statistics
from lexel.evaluate.results import as_result
from lexel.evaluate.rules import find_protocol
from lexel.evaluate.sources import ImageTokenizer, open_samples, resized
from lexel.evaluate.stream import discard_partial
from lexel.metrics import Protocol, ReferenceStatistics
from lexel.runtime import exact_float32, runtime


def evaluate_samples(
    samples: str | Path | ImageSet | TokenSet,
    reference: str | Path | ImageSet,
    protocol: str | Protocol = "lexel",
    *,
    tokenizer: ImageTokenizer | None = None,
    split: str | None = None,
    metrics: Sequence[str] | None = None,
    network: str | None = None,
    weights: str | Path | None = None,
    options: Options | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measures generated images against real ones.

    Args:
        samples: a folder of images of one size, an .npz of ADM's layout (`arr_0` uint8 (N, H, W, 3)), a folder of
            Lexel tokens (decoded by `tokenizer`), or an ImageSet.
        reference: a folder of real images (brought to the samples' size by the protocol's transform), an .npz with
            statistics (`mu`, `sigma`, ...: ADM's, pytorch-fid's, clean-fid's or ours) or with images, or an ImageSet.
        protocol: a key of `lexel.evaluate.PROTOCOLS`, or a Protocol of your own.
        tokenizer: decodes token sets.
        split: of the reference, if it has any.
        metrics: keys of `lexel.evaluate.METRICS`; the protocol's `generation` metrics by default.
        network, weights, options, changes: as for `evaluate_tokenizer`; `limit` takes the first samples.

    Returns:
        A result, as `evaluate_tokenizer` gives it, with the `reference` beside it.

    Raises:
        UsageError: as for `evaluate_tokenizer`; statistics that were made in another way are refused.
    """
    started = time.monotonic()
    options = (options or Options()).changed(changes)
    chosen = find_protocol(protocol)
    classes = wanted(chosen.generation if metrics is None else metrics)
    where = runtime(join(options.device), options.precision)
    fake = open_samples(
        samples,
        tokenizer,
        chosen,
        where,
        options.workers,
        options.limit,
        options.pixel_limit,
        options.max_unreadable,
    )
    if fake.size[0] != fake.size[1]:
        raise UsageError(f"samples must be square, got {fake.size[0]} x {fake.size[1]} pixels")
    chosen = resized(chosen, fake.size[0])
    resume = None if options.resume is None else Path(options.resume)
    # Parts have nothing in common but the folder: each takes the reference from the cache or computes it.
    whole = None if resume is None or options.part is not None else resume
    warnings: list[str] = []
    with exact_float32(where.device.type):
        networks = Networks(chosen, network, weights, where.device)

        known: dict[str | None, ReferenceStatistics] = {}
        for name in dict.fromkeys(kind.network for kind in classes.values() if "features" in kind.needs):
            used = networks.get(name)
            if used is None:
                continue
            own_folder = None if whole is None else whole / f"reference-{used.name}"
            try:
                known[name] = reference_statistics(
                    reference,
                    chosen,
                    used,
                    split=split,
                    spatial=name is None and "spatial_frechet" in classes,
                    warnings=warnings,
                    options=options.changed({"limit": None, "part": None, "resume": own_folder}),
                )
            except UsageError as error:
                if name is None:
                    raise
                networks.reasons[name] = str(error)
        context = Context(
            protocol=chosen,
            plan=SamplePlan.of(len(fake), chosen),
            size=fake.size,
            device=where.device,
            sorted_by_class=fake.sorted_by_class,
        )
        built = build_metrics(classes, context, networks, warnings, known)
        warnings = [*networks.warnings, *warnings]

        def batch_of(images: Tensor, numbers: Tensor) -> Batch:
            return Batch(chosen, numbers, images.to(where.device))

        identity = identity_of("generation", chosen, built, networks, fake, options.precision)
        identity["reference"] = {name or "": fingerprint_of(statistics) for name, statistics in known.items()}
        visited = measure(fake, built, batch_of, options, identity)
        if options.part is not None:
            return part_measured(options.part, visited, warnings)
        values = results_of(built)
        discard_partial(resume)
    result = as_result(identity, chosen, fake, visited, values, warnings, where, started)
    first = known.get(None) or next(iter(known.values()), None)
    if first is not None:
        result["reference"] = {**first.about, "images": first.pooled.n, "statistics": fingerprint_of(first)}
    return result
