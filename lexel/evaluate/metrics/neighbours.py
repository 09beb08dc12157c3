"""Metrics of pairs of features: precision and recall, the kernel inception distance, and MMD with a Gaussian kernel."""

from lexel.evaluate.metric import Batch, Context, Metric, Values
from lexel.metrics import FeatureBank, gaussian_mmd, kernel_distance, precision_recall


class PairMetric(Metric):
    """Base of metrics that compare the features of samples with those of the reference, one by one."""

    needs = frozenset({"features", "reference", "reference_features"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.states = {"bank": FeatureBank(context.features_of.dims)}

    def update(self, batch: Batch) -> None:
        self.states["bank"].add(batch.features(self.context.features_of).pooled, batch.numbers)

    def _suffix(self) -> str:
        name = self.context.features_of.name
        return "" if name == "inception" else f"_{name}"


class PrecisionRecall(PairMetric):
    """Improved precision and recall, with the conventions of the ADM evaluator."""

    def compute(self) -> Values:
        values, protocol, reference = Values(), self.context.protocol, self.context.reference
        assert reference is not None
        assert reference.features is not None
        device = self.context.device
        real, fake = reference.features.to(device), self.states["bank"].features().to(device)
        precision, recall = precision_recall(real, fake, protocol.neighbours)
        values.metrics |= {f"precision{self._suffix()}": precision, f"recall{self._suffix()}": recall}
        if len(real) < protocol.reference_features:
            values.warnings.append(
                f"precision and recall are taken against {len(real)} real images; published ones against"
                f" {protocol.reference_features}"
            )
        return values


class KID(PairMetric):
    """Kernel inception distance: the mean over random subsets, with its standard error."""

    def compute(self) -> Values:
        values, protocol, reference = Values(), self.context.protocol, self.context.reference
        assert reference is not None
        assert reference.features is not None
        distance = kernel_distance(
            reference.features.cpu(), self.states["bank"].features(), protocol.kid_subsets, protocol.kid_size
        )
        name = f"kid{self._suffix()}"
        values.metrics[name] = distance.mean
        values.intervals[name] = {"standard_error": distance.standard_error}
        return values


class MMD(PairMetric):
    """`mmd_NETWORK`: maximum mean discrepancy of unit features with a Gaussian kernel, CMMD's formula.

    In CLIP's features it is CMMD (https://arxiv.org/abs/2401.09603); in another network's it carries that name.
    """

    def compute(self) -> Values:
        reference = self.context.reference
        assert reference is not None
        assert reference.features is not None
        device = self.context.device
        real, fake = reference.features.to(device), self.states["bank"].features().to(device)
        name = self.context.features_of.name
        return Values({"cmmd" if name.startswith("clip") else f"mmd_{name}": gaussian_mmd(real, fake)})
