"""The metrics that an evaluation can take, by name. A new one is one file and one line, or an entry point."""

from collections.abc import Sequence

from lexel import registry
from lexel.evaluate.metric import Metric
from lexel.evaluate.metrics.dists import DISTSDistance
from lexel.evaluate.metrics.frechet import EfficientNetFrechet, Frechet, SpatialFrechet
from lexel.evaluate.metrics.latents import Latents
from lexel.evaluate.metrics.lpips import LPIPSDistance
from lexel.evaluate.metrics.neighbours import KID, MMD, PrecisionRecall
from lexel.evaluate.metrics.pixels import L1, PSNR, SSIM
from lexel.evaluate.metrics.score import InceptionScore
from lexel.evaluate.metrics.text import TextSurvival
from lexel.evaluate.metrics.unseen import UnseenCodes
from lexel.evaluate.metrics.usage import Usage

GROUP = "lexel.metrics"  # entry points of other packages

METRICS: dict[str, type[Metric]] = {  # results come in this order
    "frechet": Frechet,
    "frechet_efficientnet_lite0": EfficientNetFrechet,
    "spatial_frechet": SpatialFrechet,
    "inception_score": InceptionScore,
    "l1": L1,
    "psnr": PSNR,
    "ssim": SSIM,
    "lpips": LPIPSDistance,
    "dists": DISTSDistance,
    "usage": Usage,
    "unseen_codes": UnseenCodes,
    "latents": Latents,
    "text": TextSurvival,
    "precision_recall": PrecisionRecall,
    "kid": KID,
    "mmd": MMD,
}


def wanted(asked: Sequence[str]) -> dict[str, type[Metric]]:
    """The metrics of these names, in the table's order; those of other packages last.

    Raises:
        UsageError: there is no such metric.
    """
    found = {name: registry.lookup(METRICS, name, "metric", GROUP) for name in asked}
    order = [*(name for name in METRICS if name in found), *(name for name in found if name not in METRICS)]
    return {name: found[name] for name in order}


__all__ = ["GROUP", "METRICS", "wanted"]
