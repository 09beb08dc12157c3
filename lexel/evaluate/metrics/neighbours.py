"""Metrics of pairs of features: precision and recall, the kernel inception distance, and MMD with a Gaussian kernel."""

from torch import Tensor

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

    def _sides(self) -> tuple[Tensor, Tensor]:
        """Features of the real images and of the samples, on the device of the evaluation."""
        reference, device = self.context.reference, self.context.device
        assert reference is not None
        assert reference.features is not None
        return reference.features.to(device), self.states["bank"].features().to(device)

    def _suffix(self) -> str:
        name = self.context.features_of.name
        return "" if name == "inception" else f"_{name}"


class PrecisionRecall(PairMetric):
    """Improved precision and recall, with the conventions of the ADM evaluator."""

    def compute(self) -> Values:
        values, protocol = Values(), self.context.protocol
        real, fake = self._sides()
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
        values, protocol = Values(), self.context.protocol
        real, fake = (side.cpu() for side in self._sides())
        distance = kernel_distance(real, fake, protocol.kid_subsets, protocol.kid_size)
        name = f"kid{self._suffix()}"
        values.metrics[name] = distance.mean
        values.intervals[name] = {"standard_error": distance.standard_error}
        return values


class MMD(PairMetric):
    """`mmd_NETWORK`: maximum mean discrepancy of unit features with a Gaussian kernel, CMMD's formula.

    In CLIP's features it is CMMD (https://arxiv.org/abs/2401.09603); in another network's it carries that name.
    """

    def compute(self) -> Values:
        name = self.context.features_of.name
        return Values({"cmmd" if name.startswith("clip") else f"mmd_{name}": gaussian_mmd(*self._sides())})
