"""Which feature network a metric gets, and what of it decides numbers."""

from pathlib import Path
from typing import Any

import torch

from lexel import networks, registry
from lexel.errors import UsageError
from lexel.metrics import Protocol
from lexel.networks import FeatureNetwork
from lexel.runtime import cache_folder, is_cached

OFFLINE = "efficientnet_lite0"  # stands in where FID's Inception is not at hand; a package carries its weights


class Networks:
    """The feature networks of an evaluation, each built when a metric first asks for it.

    Args:
        protocol: names the network of metrics that name none.
        name: a network to use instead of the protocol's.
        weights: the weights file of the protocol's network, or of `name`.
        device: where they run.

    Attributes:
        warnings: what was used instead of what the protocol names.
        reasons: why a network cannot be had, by its name; None for the protocol's.
    """

    def __init__(self, protocol: Protocol, name: str | None, weights: str | Path | None, device: torch.device) -> None:
        self.protocol, self.name, self.weights, self.device = protocol, name, weights, device
        self.warnings: list[str] = []
        self.reasons: dict[str | None, str] = {}
        self._built: dict[str, FeatureNetwork] = {}

    def get(self, name: str | None) -> FeatureNetwork | None:
        """The network of this name, or the protocol's for None; None where its weights are not found.

        Raises:
            UsageError: the caller asked for a network or gave weights, and it cannot be had.
        """
        if name in self.reasons:
            return None
        asked = name is None and (self.name is not None or self.weights is not None)
        chosen = name or self._chosen()
        if chosen not in self._built:
            try:
                self._built[chosen] = self._build(chosen, self.weights if name is None else None)
            except UsageError as error:
                if asked or chosen not in registry.names(networks.FEATURE_NETWORKS, networks.GROUP):
                    raise
                self.reasons[name] = str(error)
                return None
        return self._built[chosen]

    @property
    def main(self) -> FeatureNetwork | None:
        """The network of metrics that name none, if one of them has asked for it."""
        return self._built.get(self._chosen())

    def _chosen(self) -> str:
        """The network asked for; else the protocol's, if its weights are here; else the offline one, with a warning."""
        wanted = self.protocol.network
        if self.name is not None:
            return self.name
        cached = is_cached(cache_folder() / "networks" / "inception.safetensors")
        if wanted != "inception" or self.weights is not None or cached:
            return wanted
        if not self.warnings:
            self.warnings.append(
                f"protocol {self.protocol.name!r} uses {wanted}, whose weights are not here: numbers are"
                f" of {OFFLINE} and carry its name; give the weights file to get the published ones"
            )
        return OFFLINE

    def _build(self, name: str, weights: str | Path | None) -> FeatureNetwork:
        own = name == self.protocol.network  # the protocol's choices are about its own network
        bias = self.protocol.score.bias if own else None
        built = networks.build(name, weights, self.protocol.resize if own else None, bias).to(self.device)
        # On a CPU this layout is the faster one, most of all for depthwise convolutions.
        return built.to(memory_format=torch.channels_last) if self.device.type == "cpu" else built  # type: ignore[call-overload]


def described(network: FeatureNetwork | None) -> dict[str, Any] | None:
    """The properties of a network that decide its numbers, as plain data."""
    if network is None:
        return None
    return {
        "name": network.name,
        "fingerprint": network.fingerprint,
        "dims": network.dims,
        "resize": network.resize_rule,
        "logit_bias": network.logit_bias,
    }


REFERENCE_CHOICES = ("transform", "size", "rounding", "reading", "division", "file")


def reference_choices(protocol: Protocol) -> dict[str, Any]:
    """The fields of a protocol that decide the statistics of its real side."""
    return {name: getattr(protocol, name) for name in REFERENCE_CHOICES}
