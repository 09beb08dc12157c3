"""Fréchet distances between Gaussians fitted to features: FID, rFID, sFID, and the same in other networks."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lexel.evaluate.metric import GROUPS, Batch, Context, Metric, Values
from lexel.metrics import Moments, MomentState, frechet_terms, jackknife
from lexel.metrics.frechet import factor
from lexel.networks import FeatureNetwork, Features


class Frechet(Metric):
    """`rfid` of reconstructions, `fid` of samples; `fd_NETWORK` of a network other than FID's Inception.

    Reconstructions are held against the very images they were made from, so a group of samples is left out on both
    sides for the interval; the statistics of generated images' reference stay.
    """

    needs = frozenset({"features"})
    of_originals = ("real",)
    part: Literal["pooled", "spatial"] = "pooled"
    short = "fid"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.states = {"fake": MomentState(self._dims(context.features_of), GROUPS)}
        if context.paired:
            self.states["real"] = MomentState(self._dims(context.features_of), GROUPS)

    @classmethod
    def impossible(cls, context: Context) -> str | None:
        return None if context.paired or context.reference is not None else "there are no reference statistics"

    @classmethod
    def _dims(cls, network: FeatureNetwork) -> int:
        return network.dims

    def update(self, batch: Batch) -> None:
        network, group = self.context.features_of, self.context.plan.group[batch.numbers]
        if "real" in self.states:  # else it is known from the cache
            self.states["real"].add(self._rows(batch.original_features(network)), group)
        self.states["fake"].add(self._rows(batch.features(network)), group)

    def compute(self) -> Values:
        values, network, fake = Values(), self.context.features_of, self.states["fake"]
        groups = [None, *groups_of(fake)]
        if self.context.paired:
            real = self.states["real"]
            terms = [frechet_terms(fake.moments(group), real.moments(group)) for group in groups]
        else:
            reference = self._reference()
            assert reference is not None
            root = factor(reference)  # the reference stays: its root is taken once
            terms = [frechet_terms(fake.moments(group), reference, root) for group in groups]
        name = self._name()
        add_jackknifed(values, name, [term.distance for term in terms])
        clipped = max(term.clipped for term in terms)
        if clipped > 1e-6:
            values.warnings.append(
                f"{name}: a covariance has negative eigenvalues, set to zero ({clipped:.1e} of the traces)"
            )
        if self.part == "pooled":
            _warn_of_size(values, int(fake.n.sum()), self.context, network)
        return values

    def _rows(self, features: Features) -> Tensor:
        rows: Tensor = getattr(features, self.part)
        return rows

    def _reference(self) -> Moments | None:
        return None if self.context.reference is None else getattr(self.context.reference, self.part)

    def _name(self) -> str:
        network = self.context.features_of.name
        if network != "inception":
            return f"{self.short.replace('fid', 'fd')}_{network}"
        return f"r{self.short}" if self.context.paired else self.short


class SpatialFrechet(Frechet):
    """`sfid` (sFID): the Fréchet distance of a map flattened as (height, width, channel)."""

    needs = frozenset({"features", "spatial"})
    part = "spatial"
    short = "sfid"

    @classmethod
    def impossible(cls, context: Context) -> str | None:
        if not context.paired and (context.reference is None or context.reference.spatial is None):
            return "the reference has no mu_s and sigma_s"
        return None

    @classmethod
    def _dims(cls, network: FeatureNetwork) -> int:
        return network.spatial_dims or 0


class EfficientNetFrechet(Frechet):
    """`fd_efficientnet_lite0`: the Fréchet distance in a network whose weights are in a package, under any protocol."""

    network = "efficientnet_lite0"


def add_jackknifed(values: Values, name: str, estimates: Sequence[float]) -> None:
    """Adds a number with its interval: the first estimate is of everything, the others each leave a group out."""
    values.metrics[name] = estimates[0]
    if len(estimates) > 2:
        values.intervals[name] = jackknife(estimates[0], estimates[1:])._asdict()


def groups_of(state: MomentState) -> list[int]:
    """The groups that can be left out: those that have samples, if enough samples remain."""
    present = [group for group in range(state.groups) if state.n[group] > 0]
    return present if int(state.n.sum() - state.n.max()) >= 2 else []


def _warn_of_size(values: Values, count: int, context: Context, network: FeatureNetwork) -> None:
    if count <= network.dims:
        values.warnings.append(
            f"{count} images are too few for the {network.dims} features of {network.name}: the covariance is"
            f" singular and the distance far too large; use more than {network.dims}"
        )
    protocol, reference = context.protocol, context.reference
    if count < protocol.samples:
        values.warnings.append(
            f"{count} images, where published numbers of protocol {protocol.name!r} are of {protocol.samples}: Fréchet"
            " distances fall with the number of images; compare only equal numbers"
        )
    if reference is not None and reference.pooled.n is not None and reference.pooled.n <= network.dims:
        values.warnings.append(
            f"the reference has {reference.pooled.n} images, too few for the {network.dims} features of {network.name}"
        )
