"""Generated images, measured against real ones."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel import checkpoint
from lexel.data import ImageSet
from lexel.data.tokens import TokenSet
from lexel.distributed import broadcast, join, rank
from lexel.errors import UsageError
from lexel.evaluate.features import (
    GROUPS,
    Plan,
    described,
    look,
    network_for,
    reference_choices,
    see,
    shown,
)
from lexel.evaluate.results import as_result, wanted_of
from lexel.evaluate.sources import Archive, Pictures, Source, open_samples, open_set, resized, transform_of
from lexel.evaluate.stream import Progress, Seen, forget, stream
from lexel.evaluate.values import (
    Values,
    add_jackknifed,
    add_score,
    groups_of,
    on_one_process,
    warn_of_damage,
    warn_of_size,
)
from lexel.metrics import (
    FeatureBank,
    MomentState,
    Protocol,
    ReferenceStatistics,
    ScoreState,
    arrays_in,
    frechet_terms,
    kernel_distance,
    precision_recall,
    read_statistics,
    write_statistics,
)
from lexel.metrics.frechet import factor
from lexel.metrics.protocols import protocol as find_protocol
from lexel.networks import FeatureNetwork
from lexel.runtime import cache_folder, exact_float32, runtime
from lexel.tokenizer import Tokenizer


def evaluate_samples(
    samples: str | Path | ImageSet | TokenSet,
    reference: str | Path | ImageSet,
    protocol: str | Protocol = "lexel",
    *,
    tokenizer: Tokenizer | None = None,
    split: str | None = None,
    metrics: Sequence[str] | None = None,
    network: str | None = None,
    weights: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "float32",
    workers: int = 0,
    cache: bool = True,
    resume: str | Path | None = None,
    save_every: float = 120.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures generated images against real ones.

    Args:
        samples: a folder of images of one size, an .npz of ADM's layout (`arr_0` uint8 (N, H, W, 3)), a folder of
            Lexel tokens (decoded by `tokenizer`), or an ImageSet.
        reference: a folder of real images (brought to the samples' size by the protocol's transform), an .npz with
            statistics (`mu`, `sigma`, ...: ADM's, pytorch-fid's, clean-fid's or ours) or with images, or an ImageSet.
        protocol: a key of `lexel.metrics.PROTOCOLS`, or a Protocol of your own.
        tokenizer: decodes token sets.
        split: of the reference, if it has any.
        metrics: some of the protocol's `generation` metrics; all by default.
        network, weights, device, precision, workers, resume, save_every, progress: as for `evaluate_tokenizer`.
        limit: takes the first so many samples.
        batch_size: images at a time.
        cache: keeps the reference's statistics by the fingerprint of data, protocol and network, and finds them again.

    Raises:
        UsageError: as for `evaluate_tokenizer`; statistics that were made in another way are refused.
    """
    started = time.monotonic()
    chosen = find_protocol(protocol)
    wanted = wanted_of(chosen.generation, metrics)
    where = runtime(join(device), precision)
    made = open_samples(samples, tokenizer, where, workers, limit)
    if made.size[0] != made.size[1]:
        raise UsageError(f"samples must be square, got {made.size[0]} x {made.size[1]} pixels")
    chosen = resized(chosen, made.size[0])
    with exact_float32(where.device.type):
        warnings: list[str] = []
        extractor = network_for(chosen, network, weights, where, warnings)
        resumed = None if resume is None else Path(resume)
        known = reference_statistics(
            reference,
            chosen,
            extractor,
            split=split,
            spatial="spatial_frechet" in wanted,
            batch_size=batch_size,
            workers=workers,
            cache=cache,
            resume=None if resumed is None else resumed / "reference",
            save_every=save_every,
            progress=progress,
        )
        wanted = _measurable(wanted, extractor, known, warnings)
        plan = Plan.of(len(made), chosen)
        states: dict[str, Any] = {"made.pooled": MomentState(extractor.dims, GROUPS)}
        if "spatial_frechet" in wanted:
            states["made.spatial"] = MomentState(extractor.spatial_dims or 0, GROUPS)
        if "inception_score" in wanted:
            states["made.score"] = ScoreState(extractor.classes, plan.splits, GROUPS)
        if wanted & {"precision_recall", "kid"}:
            states["made.bank"] = FeatureBank(extractor.dims)

        def take(pictures: Tensor, numbers: Tensor) -> None:
            look(states, "made", extractor, chosen, pictures.to(where.device), numbers, plan)

        identity = {
            "kind": "generation",
            "protocol": chosen.choices(),
            "metrics": sorted(wanted),
            "network": described(extractor),
            "source": made.listing(),
            "reference": known.about.get("statistics", _digest_of(known)),
            "precision": precision,
        }
        seen = stream(made, states, take, identity, batch_size, resumed, save_every, progress)
        values = on_one_process(lambda: _generation_values(states, chosen, extractor, seen, wanted, known))
        forget(resumed)
    result = as_result(identity, chosen, made, seen, values, warnings, where, started)
    result["reference"] = {**known.about, "images": known.pooled.n, "statistics": identity["reference"]}
    return result


def reference_statistics(
    reference: str | Path | ImageSet,
    protocol: Protocol,
    network: FeatureNetwork,
    *,
    split: str | None = None,
    spatial: bool = True,
    batch_size: int = 32,
    workers: int = 0,
    cache: bool = True,
    resume: str | Path | None = None,
    save_every: float = 120.0,
    progress: Progress | None = None,
) -> ReferenceStatistics:
    """The real side of a comparison: read from a statistics file, found in the cache, or computed.

    Args:
        reference: as for `evaluate_samples`.
        protocol: says how pictures become squares and what the network sees.
        network: a feature network, on its device.
        spatial: whether sFID's statistics are wanted as well.
        others: as for `evaluate_samples`.

    Raises:
        UsageError: the file's statistics were made by another network, or under another protocol.
    """
    known, source = _open_reference(reference, split, protocol, network, workers)
    if source is None:
        assert known is not None
        return known
    states: dict[str, Any] = {"bank": FeatureBank(network.dims)}
    if known is None:
        states["pooled"] = MomentState(network.dims)
        if spatial and network.spatial_dims is not None:
            states["spatial"] = MomentState(network.spatial_dims)
    device = next(network.buffers()).device
    kept = _chosen(len(source), protocol.reference_features)

    def take(pictures: Tensor, numbers: Tensor) -> None:
        features = see(network, shown(pictures.to(device), protocol))
        chosen = kept[numbers]
        states["bank"].add(features.pooled[chosen.to(device)], numbers[chosen])
        if "pooled" in states:
            states["pooled"].add(features.pooled)
        if "spatial" in states and features.spatial is not None:
            states["spatial"].add(features.spatial)

    about: dict[str, Any] = {
        "kind": "reference",
        "network": described(network),
        "choices": reference_choices(protocol),
        "parts": sorted(states),
        "source": source.listing(),
    }
    key = hashlib.sha256(json.dumps([about, protocol.reference_features], sort_keys=True).encode()).hexdigest()
    cached = cache_folder() / "statistics" / f"{key}.npz"
    if cache and known is None and broadcast(cached.is_file()):
        return read_statistics(cached)
    seen = stream(source, states, take, about, batch_size, resume, save_every, progress)
    features = states["bank"].features()
    if known is not None:
        forget(resume)
        return dataclasses.replace(known, features=features)
    spatial_moments = states["spatial"].moments() if "spatial" in states else None
    about |= {"data": seen.fingerprint, "unreadable": len(seen.unreadable), "statistics": key}
    computed = ReferenceStatistics(states["pooled"].moments(), spatial_moments, features, about)
    if cache and rank() == 0:
        write_statistics(cached, computed)
    forget(resume)
    return computed


def _open_reference(
    reference: str | Path | ImageSet, split: str | None, protocol: Protocol, network: FeatureNetwork, workers: int
) -> tuple[ReferenceStatistics | None, Source | None]:
    """Statistics that a file holds, and the images that are still to be looked at; at least one of the two.

    ADM's files hold both: statistics of the whole set, and images of which precision and recall take the features.
    """
    if isinstance(reference, ImageSet) or Path(reference).suffix != ".npz":
        images = open_set(reference, split, protocol.size)
        return None, Pictures(images, transform_of(protocol), workers, range(len(images)))
    path = Path(reference).expanduser()
    arrays = arrays_in(path)
    if "arr_0" in arrays and "mu" not in arrays:
        return None, Archive(path)
    known = read_statistics(path)
    _check_statistics(known, path, protocol, network)
    looked_at = known.features is not None or "arr_0" not in arrays
    return known, None if looked_at else Archive(path, limit=protocol.reference_features)


def _generation_values(
    states: dict[str, Any],
    protocol: Protocol,
    extractor: FeatureNetwork,
    seen: Seen,
    wanted: set[str],
    known: ReferenceStatistics,
) -> Values:
    values = Values()
    own = "" if extractor.name == "inception" else f"_{extractor.name}"
    for metric, part, short, reference in (
        ("frechet", "pooled", "fid", known.pooled),
        ("spatial_frechet", "spatial", "sfid", known.spatial),
    ):
        if metric not in wanted or reference is None:
            continue
        state = states[f"made.{part}"]
        root = factor(reference)  # the reference stays: its root is taken once
        terms = [frechet_terms(state.moments(group), reference, root) for group in (None, *groups_of(state))]
        name = short if not own else f"{short.replace('fid', 'fd')}{own}"
        add_jackknifed(values, name, [term.distance for term in terms])
        warn_of_damage(values, name, max(term.clipped for term in terms))
    warn_of_size(values, seen.count, protocol, extractor)
    if known.pooled.n is not None and known.pooled.n <= extractor.dims:
        values.warnings.append(
            f"the reference has {known.pooled.n} images, too few for the {extractor.dims} features of {extractor.name}"
        )
    if "inception_score" in wanted:
        add_score(values, states["made.score"], extractor)
    if known.features is not None and wanted & {"precision_recall", "kid"}:
        device = next(extractor.buffers()).device
        real, made = known.features.to(device), states["made.bank"].features().to(device)
        if "precision_recall" in wanted:
            precision, recall = precision_recall(real, made, protocol.neighbours)
            values.metrics |= {f"precision{own}": precision, f"recall{own}": recall}
            if len(real) < protocol.reference_features:
                values.warnings.append(
                    f"precision and recall are taken against {len(real)} real images; published ones against"
                    f" {protocol.reference_features}"
                )
        if "kid" in wanted:
            distance = kernel_distance(real.cpu(), made.cpu(), protocol.kid_subsets, protocol.kid_size)
            values.metrics[f"kid{own}"] = distance.mean
            values.intervals[f"kid{own}"] = {"standard_error": distance.standard_error}
    return values


def _chosen(count: int, kept: int) -> Tensor:
    """Which of `count` samples are kept as features: `kept` of them at random, always the same ones; bool (count,)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, order[:kept], True)


def _measurable(
    wanted: set[str], extractor: FeatureNetwork, known: ReferenceStatistics, warnings: list[str]
) -> set[str]:
    """What remains of the metrics with this network and this reference, with a word on each that is left out."""
    missing = {
        "spatial_frechet": (known.spatial is None or extractor.spatial_dims is None)
        and (
            f"{extractor.name} has no spatial map"
            if extractor.spatial_dims is None
            else "the reference has no mu_s and sigma_s"
        ),
        "precision_recall": known.features is None and "the reference holds neither images nor features",
        "kid": known.features is None and "the reference holds neither images nor features",
    }
    for metric, reason in missing.items():
        if metric in wanted and reason:
            warnings.append(f"{metric} is left out: {reason}")
            wanted = wanted - {metric}
    return wanted


def _check_statistics(known: ReferenceStatistics, path: Path, protocol: Protocol, network: FeatureNetwork) -> None:
    if len(known.pooled.mean) != network.dims:
        raise UsageError(
            f"{path} holds statistics of {len(known.pooled.mean)} features, {network.name} has {network.dims}: they"
            " were made with another network"
        )
    if "network" in known.about and known.about["network"] != described(network):
        theirs = known.about["network"]
        raise UsageError(
            f"{path} was made with {theirs['name']} ({theirs['resize']}, weights {theirs['fingerprint'][:12]}), this is"
            f" {network.name} ({network.resize_rule}, weights {network.fingerprint[:12]}); compute it again"
        )
    for name, value in known.about.get("choices", {}).items():
        if value != reference_choices(protocol)[name]:
            raise UsageError(
                f"{path} was made with {name} {value}, protocol {protocol.name!r} has {name}"
                f" {reference_choices(protocol)[name]}; compute it again"
            )
    if known.spatial is not None and len(known.spatial.mean) != network.spatial_dims:
        raise UsageError(
            f"{path}: mu_s has {len(known.spatial.mean)} values, {network.name} has {network.spatial_dims}"
        )


def _digest_of(known: ReferenceStatistics) -> str:
    """Names statistics that came without a name."""
    parts = {"mean": known.pooled.mean, "covariance": known.pooled.covariance}
    return checkpoint.fingerprint({}, parts)
