"""The contract of a metric: what it needs, how it takes batches in, how it is merged and saved, what numbers it gives.

A new metric is one file with a subclass of `Metric` and one line in `lexel/evaluate/metrics/__init__.py`, or an entry
point of the group `lexel.metrics` in another package. docs/extending/metric.md has an example that runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lexel.distributed import gather
from lexel.errors import UsageError
from lexel.metrics import Interval, MeanState, Protocol, ReferenceStatistics, contiguous_splits, deal, shuffled
from lexel.metrics.pixels import on_unit_scale, through_jpeg
from lexel.metrics.states import is_texts
from lexel.networks import FeatureNetwork, Features

GROUPS = 10  # of samples, each left out once for the confidence intervals

# What a metric may need, and why it can be missing.
NEEDS = {
    "originals": "generated images have no originals",
    "indices": "images that come from no tokenizer, or from a continuous one, have no indices",
    "latents": "the tokenizer shows no latents",
    "features": "there is no feature network",
    "logits": "{network} has no class scores",
    "spatial": "{network} has no spatial map",
    "reference": "there are no reference statistics",
    "reference_features": "the reference holds neither images nor features",
}


@dataclass
class Values:
    """Numbers by name, their intervals, and warnings about them."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)  # fields of `Interval` by name
    warnings: list[str] = field(default_factory=list)

    def add_mean(self, name: str, state: MeanState) -> None:
        """A mean over images, with its normal interval where there are two images or more."""
        self.metrics[name] = state.mean
        error = state.standard_error
        if error == error:  # not NaN
            reach = 1.96 * error
            self.intervals[name] = Interval(state.mean - reach, state.mean + reach, error)._asdict()

    def update(self, other: "Values") -> None:
        self.metrics |= other.metrics
        self.intervals |= other.intervals
        self.warnings += other.warnings


@dataclass(frozen=True)
class SamplePlan:
    """Group and split of every sample number: a function of the numbers alone, whatever the batches and processes."""

    group: Tensor  # int64 (N,): left out together, for the intervals
    split: Tensor  # int64 (N,): of the inception score
    splits: int

    @classmethod
    def of(cls, count: int, protocol: Protocol) -> Self:
        rule = protocol.score
        split = contiguous_splits(count, rule.splits, rule.split_size)
        split = shuffled(split, seed=0) if rule.shuffle else split
        return cls(deal(count, GROUPS), split, int(split.max()) + 1 if count else 1)


@dataclass(frozen=True)
class Context:
    """The evaluation that a metric is built for.

    Attributes:
        protocol: the conventions.
        plan: group and split of every sample.
        size: height and width of the images in pixels; (0, 0) for whole images of any size.
        device: where features and distances are computed.
        network: the feature network of this metric, or None.
        reference: statistics of the real images that generated ones are held against; None for reconstructions.
        paired: whether images come with their originals.
        codebook_size, books: of the indices; None where there are none.
        latents: whether batches come with the tokenizer's latents.
        sorted_by_class: whether the images come one class after the other.
    """

    protocol: Protocol
    plan: SamplePlan
    size: tuple[int, int]
    device: torch.device
    network: FeatureNetwork | None = None
    reference: ReferenceStatistics | None = None
    paired: bool = False
    codebook_size: int | None = None
    books: int | None = None
    latents: bool = False
    sorted_by_class: bool = False

    @property
    def count(self) -> int:
        """Images, readable or not."""
        return len(self.plan.group)

    @property
    def features_of(self) -> FeatureNetwork:
        """The feature network, where the metric has said that it needs one."""
        assert self.network is not None
        return self.network

    def missing(self) -> dict[str, str]:
        """The entries of NEEDS that are missing here, with the reason."""
        network, reference = self.network, self.reference
        here = {
            "originals": self.paired,
            "indices": self.codebook_size is not None,
            "latents": self.latents,
            "features": network is not None,
            "logits": network is not None and network.classes > 0,
            "spatial": network is not None and network.spatial_dims is not None,
            "reference": reference is not None,
            "reference_features": reference is not None and reference.features is not None,
        }
        name = "the feature network" if network is None else network.name
        return {need: why.format(network=name) for need, why in NEEDS.items() if not here[need]}


class Batch:
    """Images that are measured together. Features are computed on first use, once for all metrics.

    Attributes:
        numbers: int64 (B,), the samples' numbers.
        images: (B, 3, H, W) in [-1, 1]: reconstructions or samples, not rounded.
        originals: (B, 3, H, W), what `images` are reconstructions of; None for samples.
        indices: int64 (B, *grid), of reconstructions; None for samples and where there are no codes.
        latents: (B, D, *grid), of a `lexel.Tokenizer`, before quantization.
        quantized: (B, D, *grid), what it decoded.
    """

    def __init__(
        self,
        protocol: Protocol,
        numbers: Tensor,
        images: Tensor,
        originals: Tensor | None = None,
        indices: Tensor | None = None,
        latents: Tensor | None = None,
        quantized: Tensor | None = None,
    ) -> None:
        self.numbers, self.images, self.indices = numbers, images, indices
        self.latents, self.quantized = latents, quantized
        self._originals, self._protocol = originals, protocol
        self._features: dict[tuple[bool, int], Features] = {}

    @property
    def originals(self) -> Tensor:
        assert self._originals is not None  # a metric that needs originals is built where there are some
        return self._originals

    def features(self, network: FeatureNetwork, of_originals: bool = False) -> Features:
        """Features of the images, or of their originals, preprocessed as the protocol says."""
        key = (of_originals, id(network))
        if key not in self._features:
            images = self.originals if of_originals else self.images
            self._features[key] = extract(network, preprocess(images, self._protocol))
        return self._features[key]


def preprocess(images: Tensor, protocol: Protocol) -> Tensor:
    """Images in [-1, 1] as a protocol shows them to a feature network: clamped, rounded, through a file."""
    images = on_unit_scale(images, protocol.rounding) * 2 - 1
    return through_jpeg(images, 75) if protocol.file == "jpeg75" else images


def extract(network: FeatureNetwork, images: Tensor) -> Features:
    """Features of images; on a CPU four at a time, which its caches hold: 2.2 times as fast as 32."""
    if images.device.type != "cpu":
        return network(images)
    parts = [network(part) for part in images.split(4)]
    logits, spatial = (
        None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
        for name in ("logits", "spatial")
    )
    return Features(torch.cat([part.pooled for part in parts]), logits, spatial)


class Metric:
    """One entry of a result.

    A subclass says what it `needs`, makes its accumulators in `self.states` (objects with `merge`, `all_reduce`,
    `state_dict` and `load_state_dict`, such as `lexel.metrics.MeanState`), and writes `update`, and `compute` where its
    numbers are more than their means.

    Attributes:
        needs: of NEEDS; where one is missing the metric is left out, with a warning that says why.
        network: name of the feature network that the metric is defined over; None is the protocol's.
        of_originals: names of states that depend on the originals alone, and so are kept in the cache.
        states: the accumulators by name.
        left_out: numbers that cannot be given, with the reason.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    network: ClassVar[str | None] = None
    of_originals: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: Context) -> None:
        self.context = context
        self.states: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    @classmethod
    def impossible(cls, context: Context) -> str | None:
        """Why this metric cannot be taken here, beyond what it `needs`; None where it can."""
        return None

    def update(self, batch: Batch) -> None:
        """Takes a batch in."""
        raise NotImplementedError

    def fits(self, batch: Batch, smallest: int, name: str, what: str) -> bool:
        """Whether images have the `smallest` pixels a side that `what` needs; else the number `name` is left out."""
        if min(batch.images.shape[-2:]) >= smallest:
            return True
        self.left_out[name] = f"{what} needs {smallest} pixels a side, one image has less"
        return False

    def compute(self) -> Values:
        """The numbers of everything taken in: by default the mean of every state, under its name (`MeanState`).

        Called on rank 0, after `all_reduce`.
        """
        values = Values()
        for name, state in self.states.items():
            values.add_mean(name, state)
        return values

    def about(self) -> dict[str, Any]:
        """Facts beyond the protocol that decide the numbers, as plain data: fingerprints of weights of its own."""
        return {}

    def merge(self, other: Self) -> None:
        """Adds what another metric of the same kind has taken in; the two must not share samples."""
        for name, state in self.states.items():
            state.merge(other.states[name])
        self.left_out |= other.left_out

    def all_reduce(self) -> None:
        """Adds what every process has taken in."""
        for state in self.states.values():
            state.all_reduce()
        for reasons in gather(self.left_out):
            self.left_out |= reasons

    def state_dict(self) -> dict[str, Any]:
        states = {name: state.state_dict() for name, state in self.states.items()}
        return {"states": states, "left_out": dict(self.left_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            UsageError: it is of another metric, or damaged.
        """
        saved, left_out = state.get("states"), state.get("left_out")
        if not isinstance(saved, Mapping) or not self.states.keys() <= saved.keys():
            raise UsageError(f"a saved state of {type(self).__name__} is damaged: it has no {', '.join(self.states)}")
        if not is_texts(left_out):
            raise UsageError(f"a saved state of {type(self).__name__} is damaged: left_out is no table of texts")
        for name, accumulator in self.states.items():
            accumulator.load_state_dict(saved[name])
        self.left_out = dict(left_out)


def unmet(metric: type[Metric], context: Context) -> str | None:
    """Why a metric cannot be taken in this context; None where it can."""
    reasons = (reason for need, reason in context.missing().items() if need in metric.needs)
    return next(reasons, None) or metric.impossible(context)


def too_small(context: Context, smallest: int, what: str) -> str | None:
    """Why images of the context's size are too small; None where they are not, or the size is not known yet."""
    height, width = context.size
    if 0 < min(height, width) < smallest:
        return f"{what} needs images of at least {smallest} pixels a side, these are {height} x {width}"
    return None
