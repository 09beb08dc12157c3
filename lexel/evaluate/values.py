"""From sums to numbers: metrics by name, their intervals, and words of warning."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lexel.distributed import broadcast, rank
from lexel.metrics import Interval, MeanState, MomentState, Protocol, ScoreState, jackknife
from lexel.networks import FeatureNetwork


@dataclass
class Values:
    """What an evaluation found."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)  # fields of `Interval` by name
    warnings: list[str] = field(default_factory=list)


def on_one_process(compute: Callable[[], Values]) -> Values:
    """Computed on rank 0 and broadcast."""
    return broadcast(compute() if rank() == 0 else Values())


def groups_of(state: MomentState) -> list[int]:
    """The groups that can be left out: those that have samples, if enough samples remain."""
    present = [group for group in range(state.groups) if state.n[group] > 0]
    left = int(state.n.sum() - state.n.max())
    return present if left >= 2 else []


def add_jackknifed(values: Values, name: str, estimates: Sequence[float]) -> None:
    """The first estimate is of everything, the others each leave a group out."""
    values.metrics[name] = estimates[0]
    if len(estimates) > 2:
        values.intervals[name] = jackknife(estimates[0], estimates[1:])._asdict()


def add_score(values: Values, state: ScoreState, extractor: FeatureNetwork) -> None:
    name = "inception_score" if extractor.name == "inception" else f"inception_score_{extractor.name}"
    present = [group for group in range(state.n.shape[1]) if 0 < state.n[:, group].sum() < state.n.sum()]
    add_jackknifed(values, name, [state.score(), *(state.score(group) for group in present)])


def add_mean(values: Values, name: str, state: MeanState) -> None:
    values.metrics[name] = state.mean
    error = state.standard_error
    if math.isfinite(error):
        values.intervals[name] = Interval(
            state.mean - 1.96 * error, state.mean + 1.96 * error, error, 0.0, 0.95
        )._asdict()


def warn_of_damage(values: Values, name: str, clipped: float) -> None:
    if clipped > 1e-6:
        values.warnings.append(
            f"{name}: a covariance has negative eigenvalues, {clipped:.1e} of the traces was clipped"
        )


def warn_of_size(values: Values, count: int, protocol: Protocol, extractor: FeatureNetwork) -> None:
    if count <= extractor.dims:
        values.warnings.append(
            f"{count} images are too few for the {extractor.dims} features of {extractor.name}: the covariance is"
            f" singular and the distance far too large; use more than {extractor.dims}"
        )
    if count < protocol.samples:
        values.warnings.append(
            f"{count} images, where published numbers of protocol {protocol.name!r} are of {protocol.samples}: Fréchet"
            " distances fall with the number of images; compare only equal numbers"
        )
