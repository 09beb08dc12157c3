"""LPIPS of reconstructions, in every classifier that the protocol names."""

from collections.abc import Mapping
from typing import Any

from lexel import checkpoint
from lexel.errors import UsageError, unknown
from lexel.evaluate.metric import Batch, Context, Metric, Values
from lexel.losses import LPIPS
from lexel.losses.perceptual import NETWORKS
from lexel.metrics import MeanState
from lexel.metrics.pixels import on_unit_scale


class LPIPSDistance(Metric):
    """Learned perceptual distance to the originals, `lpips_vgg` and `lpips_alex`: the mean over images."""

    needs = frozenset({"originals"})

    def __init__(self, context: Context, loaded: Mapping[str, LPIPS] | None = None) -> None:
        """The classifiers that the protocol names; those in `loaded` are on the device already."""
        super().__init__(context)
        self.networks: dict[str, LPIPS] = {}
        for name in context.protocol.lpips:
            if name not in NETWORKS:
                raise unknown("LPIPS network", name, NETWORKS)
            try:
                network = (loaded or {}).get(name) or LPIPS(name).to(context.device)
            except UsageError as error:  # its weights are not found
                self.left_out[f"lpips_{name}"] = str(error)
                continue
            smallest = network.trunk.SMALLEST_SIDE
            if 0 < min(context.size) < smallest:
                height, width = context.size
                self.left_out[f"lpips_{name}"] = (
                    f"{name} needs images of at least {smallest} pixels a side, these are {height} x {width}"
                )
                continue
            self.networks[name] = network
        self.states = {f"lpips_{name}": MeanState() for name in self.networks}

    def update(self, batch: Batch) -> None:
        rounding = self.context.protocol.lpips_rounding
        sides = [batch.originals, batch.images]
        if rounding != "float":
            sides = [on_unit_scale(images, rounding) * 2 - 1 for images in sides]
        for name, network in self.networks.items():
            smallest = network.trunk.SMALLEST_SIDE
            if min(batch.images.shape[-2:]) < smallest:
                self.left_out[f"lpips_{name}"] = f"{name} needs {smallest} pixels a side, one image has less"
            else:
                self.states[f"lpips_{name}"].add(network(*sides))

    def compute(self) -> Values:
        values = Values()
        for name, state in self.states.items():
            if name not in self.left_out:
                values.add_mean(name, state)
        return values

    def about(self) -> dict[str, Any]:
        return {
            name: checkpoint.fingerprint({}, dict(network.named_buffers())) for name, network in self.networks.items()
        }
