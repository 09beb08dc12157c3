"""The table of losses that a recipe may weigh, one line each."""

from collections.abc import Mapping
from typing import Any

from lexel import registry
from lexel.losses.alignment import REPA, VAVAE, Alignment, DecoderDistillation, FeatureReconstruction
from lexel.losses.base import Loss
from lexel.losses.gram import GramLoss
from lexel.losses.reconstruction import DISTSLoss, L1Loss, L2Loss, LPIPSLoss

LOSSES: dict[str, type[Loss]] = {
    "l1": L1Loss,
    "l2": L2Loss,
    "lpips": LPIPSLoss,
    "dists": DISTSLoss,
    "gram": GramLoss,
    "alignment": Alignment,
    "repa": REPA,
    "va_vae": VAVAE,
    "vfmtok": FeatureReconstruction,
    "distillation": DecoderDistillation,
}
GROUP = "lexel.losses"  # the entry points by which other packages add losses


def names() -> list[str]:
    """Every kind of loss, sorted: those of the table and of other packages."""
    return registry.names(LOSSES, GROUP)


def build(kind: str, options: Mapping[str, Any]) -> Loss:
    """A loss of the table, or of another package.

    Args:
        kind: a key of LOSSES, or the name of an entry point in the group `lexel.losses`.
        options: arguments of its constructor.

    Raises:
        UsageError: the kind is unknown, an option does not fit, or the loss itself refuses.
    """
    return registry.build(registry.lookup(LOSSES, kind, "loss", GROUP), kind, options, "loss")
