"""Fréchet distances between Gaussians fitted to features: FID, rFID, sFID, and the same in other networks."""

from collections.abc import Sequence
from typing import Literal

from lexel.evaluate.metric import GROUPS, Batch, Context, Metric, Values
from lexel.metrics import Moments, MomentState, frechet_terms, jackknife
from lexel.metrics.frechet import factor
from lexel.networks import FeatureNetwork


class Frechet(Metric):
    """`rfid` of reconstructions, `fid` of samples; `fd_NETWORK` of a network other than FID's Inception.

    Reconstructions are held against the very images they were made from, so a group of samples is left out on both
    sides for the interval; the statistics of generated images' reference stay.
    """

    needs = frozenset({"features"})
    of_originals = ("real",)
    part: Literal["pooled", "spatial"] = "pooled"
    short = "fid"
    lacking = "there are no reference statistics"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        network = context.features_of
        dims = network.dims if self.part == "pooled" else network.spatial_dims or 0
        self.states = {side: MomentState(dims, GROUPS) for side in ("fake", *(["real"] if context.paired else []))}

    @classmethod
    def impossible(cls, context: Context) -> str | None:
        return None if context.paired or getattr(context.reference, cls.part, None) is not None else cls.lacking

    def update(self, batch: Batch) -> None:
        network, group = self.context.features_of, self.context.plan.group[batch.numbers]
        if "real" in self.states:  # else it is known from the cache
            self.states["real"].add(getattr(batch.features(network, of_originals=True), self.part), group)
        self.states["fake"].add(getattr(batch.features(network), self.part), group)

    def compute(self) -> Values:
        values, network, fake = Values(), self.context.features_of, self.states["fake"]
        groups = [None, *groups_of(fake)]
        if self.context.paired:
            real = self.states["real"]
            terms = [frechet_terms(fake.moments(group), real.moments(group)) for group in groups]
        else:
            reference: Moments = getattr(self.context.reference, self.part)
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
    lacking = "the reference has no mu_s and sigma_s"


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
