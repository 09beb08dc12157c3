"""Mean absolute error, PSNR and SSIM of reconstructions, the latter two by the protocol's conventions."""

import math

import torch

from lexel.evaluate.metric import Batch, Context, Metric, Values, too_small
from lexel.metrics import MeanState, psnr_of, squared_error, ssim
from lexel.metrics.pixels import WINDOW_SIDES


class L1(Metric):
    """Mean absolute difference to the originals on the scale [-1, 1], without rounding."""

    needs = frozenset({"originals"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.states = {"l1": MeanState()}

    def update(self, batch: Batch) -> None:
        self.states["l1"].add((batch.images - batch.originals).abs().flatten(1).double().mean(1))


class PSNR(Metric):
    """Peak signal-to-noise ratio in dB: the mean over images, or of the pooled error where the protocol says so."""

    needs = frozenset({"originals"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.states = {"error": MeanState(), "psnr": MeanState()}

    def update(self, batch: Batch) -> None:
        rule = self.context.protocol.psnr
        errors = squared_error(batch.originals, batch.images, rule.rounding, rule.channels)
        self.states["error"].add(errors)
        self.states["psnr"].add(psnr_of(errors))

    def compute(self) -> Values:
        values = Values()
        if self.context.protocol.psnr.pooled:
            values.metrics["psnr"] = float(psnr_of(torch.tensor(self.states["error"].mean)))
        else:
            values.add_mean("psnr", self.states["psnr"])
        if math.isinf(values.metrics["psnr"]):
            values.warnings.append("psnr is infinite: an image is reproduced exactly")
        return values


class SSIM(Metric):
    """Structural similarity: the mean over images."""

    needs = frozenset({"originals"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.states = {"ssim": MeanState()}

    @classmethod
    def impossible(cls, context: Context) -> str | None:
        return too_small(context, WINDOW_SIDES[context.protocol.ssim.window], "its window")

    def update(self, batch: Batch) -> None:
        rule = self.context.protocol.ssim
        if self.fits(batch, WINDOW_SIDES[rule.window], "ssim", "its window"):
            self.states["ssim"].add(
                ssim(batch.originals, batch.images, rule.rounding, rule.channels, rule.window, rule.data_range)
            )
