"""Statistics of real images: read from a file, found in the cache, or computed; and the cache of originals."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel import checkpoint
from lexel.arrays import open_arrays
from lexel.data import ImageSet
from lexel.data.images import digest
from lexel.data.unreadable import too_many
from lexel.distributed import broadcast, rank
from lexel.errors import UsageError
from lexel.evaluate.features import described, reference_choices
from lexel.evaluate.measure import Options, measure
from lexel.evaluate.metric import GROUPS, Batch, Context, Metric, SamplePlan
from lexel.evaluate.sources import ARRAYS, Archive, Pictures, Source, open_set, transform_of
from lexel.evaluate.stream import discard_partial
from lexel.metrics import (
    FeatureBank,
    MomentState,
    Protocol,
    ReferenceStatistics,
    read_statistics,
    write_statistics,
)
from lexel.networks import FeatureNetwork
from lexel.regular import expanded
from lexel.runtime import cache_folder, exact_float32, is_cached


def reference_statistics(
    reference: str | Path | ImageSet,
    protocol: Protocol,
    network: FeatureNetwork,
    *,
    split: str | None = None,
    spatial: bool = True,
    warnings: list[str] | None = None,
    options: Options | None = None,
    **changes: Any,
) -> ReferenceStatistics:
    """The real side of a comparison: read from a statistics file, found in the cache, or computed.

    Args:
        reference: as for `evaluate_samples`.
        protocol: says how images are resized and cropped, and what the network sees of them.
        network: a feature network, on its device.
        split: of the reference, if it has any.
        spatial: whether sFID's statistics are wanted as well.
        warnings: what is wrong with the cache is added here.
        options: how to run.
        changes: fields of `Options` by name.

    Raises:
        UsageError: the file's statistics were made by another network, or under another protocol.
    """
    options = (options or Options()).changed(changes)
    warnings = [] if warnings is None else warnings
    known, source = _open_reference(reference, split, protocol, network, options)
    if source is None:
        assert known is not None
        return known
    parts = ["bank"]
    if known is None:
        parts += ["pooled", *(["spatial"] if spatial and network.spatial_dims is not None else [])]
    about: dict[str, Any] = {
        "kind": "reference",
        "network": described(network),
        "choices": reference_choices(protocol),
        "parts": sorted(parts),
        "source": source.listing(),
    }
    key = digest([about, protocol.reference_features])
    cached = cache_folder() / "statistics" / f"{key}.npz"
    if options.cache and known is None:
        found = broadcast(_found(cached, warnings) if rank() == 0 else None)
        if found is not None:
            left_out = found.about.get("unreadable", 0)
            # One that left out more than may be is taken anew, for what it left out to be named.
            if not too_many(left_out, found.pooled.n + left_out, options.max_unreadable):
                return found
    device = next(network.buffers()).device
    plan = SamplePlan.of(len(source), protocol)
    context = Context(protocol, plan, source.size, device, network)
    collected = _Reference(context, parts)
    with exact_float32(device.type):
        visited = measure(
            source,
            {"reference": collected},
            lambda images, numbers: Batch(protocol, numbers, images.to(device)),
            options,
            about,
        )
    features = collected.states["bank"].features()
    if known is not None:
        discard_partial(options.resume)
        return dataclasses.replace(known, features=features)
    moments = collected.states["spatial"].moments() if "spatial" in parts else None
    about |= {"data": visited.fingerprint, "unreadable": len(visited.unreadable), "statistics": key}
    computed = ReferenceStatistics(collected.states["pooled"].moments(), moments, features, about)
    if options.cache and rank() == 0:
        write_to_cache(cached, lambda: write_statistics(cached, computed), warnings)
    discard_partial(options.resume)
    return computed


class _Reference(Metric):
    """Moments of all real images, and the features of some of them: at random, always the same ones."""

    needs = frozenset({"features"})

    def __init__(self, context: Context, parts: list[str]) -> None:
        super().__init__(context)
        network = context.features_of
        dims = {"pooled": network.dims, "spatial": network.spatial_dims or 0}
        self.states = {name: MomentState(dims[name]) for name in parts if name != "bank"}
        self.states["bank"] = FeatureBank(network.dims)
        order = torch.randperm(context.count, generator=torch.Generator().manual_seed(0))
        kept = order[: context.protocol.reference_features]
        self._kept = torch.zeros(context.count, dtype=torch.bool).index_fill_(0, kept, True)

    def update(self, batch: Batch) -> None:
        features = batch.features(self.context.features_of)
        chosen = self._kept[batch.numbers]
        self.states["bank"].add(features.pooled[chosen.to(features.pooled.device)], batch.numbers[chosen])
        for name in ("pooled", "spatial"):
            if name in self.states:
                self.states[name].add(getattr(features, name))


def write_to_cache(path: Path, write: Any, warnings: list[str]) -> None:
    """Writes a file of the cache; one that cannot be written costs time, not the result: a warning says so."""
    try:
        write()
    except OSError as error:
        warnings.append(f"the cache {path.parent} cannot be written ({error.strerror or error}): nothing is kept")


class Originals:
    """A cache of metrics' states over the originals: the next tokenizer on the same images takes half the time.

    Args:
        metrics: those of the evaluation; states found in the cache are taken out until `give_back`.
        source: the originals.
        protocol: its choices are part of the key.
        warnings: what is wrong with the cache is added here.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], source: Pictures, protocol: Protocol, warnings: list[str]
    ) -> None:
        self._files: dict[str, tuple[Path, Metric]] = {}  # by the metric's name
        self._warnings = warnings
        self._found: dict[str, dict[str, Any]] = {}
        cached = {name: metric for name, metric in metrics.items() if metric.states.keys() & {*metric.of_originals}}
        listing = source.listing() if cached else ""
        for name, metric in cached.items():
            key = digest([listing, reference_choices(protocol), described(metric.context.network), GROUPS, name])
            path = cache_folder() / "statistics" / f"{key}.pt"
            self._files[name] = path, metric
            if broadcast(rank() == 0 and self._read(name, path, metric)):
                for part in metric.of_originals:
                    state = metric.states.pop(part)
                    if rank() == 0:
                        self._found.setdefault(name, {})[part] = state

    def give_back(self) -> None:
        """Returns to the metrics on rank 0 what was found, and keeps what was not."""
        if rank() != 0:
            return
        for name, (path, metric) in self._files.items():
            if name in self._found:
                metric.states |= self._found[name]
                continue
            state = {part: metric.states[part].state_dict() for part in metric.of_originals}
            write_to_cache(path, lambda path=path, state=state: checkpoint.save_state(path, state), self._warnings)

    def _read(self, name: str, path: Path, metric: Metric) -> bool:
        if not is_cached(path):
            return False
        before = {part: metric.states[part].state_dict() for part in metric.of_originals}
        try:
            state = checkpoint.load_state(path)
            for part in metric.of_originals:
                metric.states[part].load_state_dict(state.get(part))
        except UsageError as error:
            self._warnings.append(f"the cached statistics of the originals are computed again: {error}")
            for part, fresh in before.items():
                metric.states[part].load_state_dict(fresh)
            return False
        return True


def _found(path: Path, warnings: list[str]) -> ReferenceStatistics | None:
    """The statistics in a file of the cache; None, and a warning, where it is damaged."""
    if not is_cached(path):
        return None
    try:
        return read_statistics(path)
    except UsageError as error:
        warnings.append(f"the cached statistics of the reference are computed again: {error}")
        return None


def _open_reference(
    reference: str | Path | ImageSet, split: str | None, protocol: Protocol, network: FeatureNetwork, options: Options
) -> tuple[ReferenceStatistics | None, Source | None]:
    """Statistics that a file holds, and the images whose features are still needed; at least one of the two.

    ADM's files hold both: statistics of the whole set, and images of which precision and recall take the features.
    """
    if isinstance(reference, ImageSet) or Path(reference).suffix not in ARRAYS:
        real = open_set(reference, split, protocol.size, 3, options.pixel_limit, options.max_unreadable)
        return None, Pictures(real, protocol, transform_of(protocol), options.workers)
    path = expanded(reference)
    with open_arrays(path) as arrays:
        images, statistics = "arr_0" in arrays, "mu" in arrays
    if images and not statistics:
        return None, Archive(path)
    known = read_statistics(path)
    _check_statistics(known, path, protocol, network)
    complete = known.features is not None or not images
    return known, None if complete else Archive(path, limit=protocol.reference_features)


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
    ours, theirs = reference_choices(protocol), known.about.get("choices")
    if theirs is not None:  # written by Lexel; what an earlier version had no choice of was as the default is now
        theirs = {**reference_choices(Protocol("", "", protocol.transform)), **theirs}
        for name, value in ours.items():
            if theirs[name] != value:
                raise UsageError(
                    f"{path} was made with {name} {theirs[name]}, protocol {protocol.name!r} has {name} {value};"
                    " compute it again"
                )
    if known.spatial is not None and network.spatial_dims not in (None, len(known.spatial.mean)):
        raise UsageError(
            f"{path}: mu_s has {len(known.spatial.mean)} values, {network.name} has {network.spatial_dims}"
        )


def fingerprint_of(known: ReferenceStatistics) -> str:
    """Names statistics, also those that came without a name."""
    parts: dict[str, Tensor] = {"mean": known.pooled.mean, "covariance": known.pooled.covariance}
    return str(known.about.get("statistics") or checkpoint.fingerprint({}, parts))
