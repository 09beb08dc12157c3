"""LPIPS of reconstructions, in every classifier that the protocol names."""

from collections.abc import Mapping
from typing import Any

from lexel import checkpoint
from lexel.errors import UsageError
from lexel.evaluate.metric import Batch, Context, Metric, too_small
from lexel.losses import LPIPS
from lexel.losses.perceptual import NETWORKS
from lexel.metrics import MeanState
from lexel.metrics.pixels import on_unit_scale
from lexel.registry import lookup


class LPIPSDistance(Metric):
    """Learned perceptual distance to the originals, `lpips_vgg` and `lpips_alex`: the mean over images."""

    needs = frozenset({"originals"})

    def __init__(self, context: Context, loaded: Mapping[str, LPIPS] | None = None) -> None:
        """The classifiers that the protocol names; those in `loaded` are on the device already."""
        super().__init__(context)
        self.networks: dict[str, LPIPS] = {}
        for name in context.protocol.lpips:
            lookup(NETWORKS, name, "LPIPS network")
            try:
                network = (loaded or {}).get(name) or LPIPS(name).to(context.device)
            except UsageError as error:  # its weights are not found
                self.left_out[f"lpips_{name}"] = str(error)
                continue
            reason = too_small(context, network.trunk.SMALLEST_SIDE, name)
            if reason is None:
                self.networks[name] = network
            else:
                self.left_out[f"lpips_{name}"] = reason
        self.states = {f"lpips_{name}": MeanState() for name in self.networks}

    def update(self, batch: Batch) -> None:
        rounding = self.context.protocol.lpips_rounding
        sides = [batch.originals, batch.images]
        if rounding != "float":
            sides = [on_unit_scale(images, rounding) * 2 - 1 for images in sides]
        for name, network in self.networks.items():
            if self.fits(batch, network.trunk.SMALLEST_SIDE, f"lpips_{name}", name):
                self.states[f"lpips_{name}"].add(network(*sides))

    def about(self) -> dict[str, Any]:
        return {
            name: checkpoint.fingerprint({}, dict(network.named_buffers())) for name, network in self.networks.items()
        }
