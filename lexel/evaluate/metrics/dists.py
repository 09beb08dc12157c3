"""DISTS of reconstructions: structure and texture similarity."""

from typing import Any

from lexel import checkpoint
from lexel.errors import UsageError
from lexel.evaluate.metric import Batch, Context, Metric, too_small
from lexel.metrics import MeanState
from lexel.metrics.pixels import on_unit_scale
from lexel.networks.dists import DISTS


class DISTSDistance(Metric):
    """`dists`: the mean over images of one minus the similarity of structure and texture; 0 for equal images."""

    needs = frozenset({"originals"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        try:
            self.distance = DISTS().to(context.device)
        except UsageError as error:  # its weights are not found
            self.left_out["dists"] = str(error)
        else:
            self.states = {"dists": MeanState()}

    @classmethod
    def impossible(cls, context: Context) -> str | None:
        return too_small(context, DISTS.SMALLEST_SIDE, "VGG16")

    def update(self, batch: Batch) -> None:
        if not self.fits(batch, DISTS.SMALLEST_SIDE, "dists", "VGG16"):
            return
        sides = [
            on_unit_scale(side, self.context.protocol.lpips_rounding) * 2 - 1
            for side in (batch.originals, batch.images)
        ]
        self.states["dists"].add(self.distance(*sides))

    def about(self) -> dict[str, Any]:
        return {"dists": checkpoint.fingerprint({}, dict(self.distance.named_buffers()))}
