"""The protocol of an evaluation by its name, or one's own: every name in it is looked up before anything is read."""

from lexel import networks, registry
from lexel.data import TRANSFORMS
from lexel.evaluate.metrics import GROUP, METRICS
from lexel.evaluate.sources import NATIVE
from lexel.losses.perceptual import NETWORKS
from lexel.metrics.protocols import Protocol, protocol


def find_protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name, or the given one, checked.

    Raises:
        UsageError: there is no such protocol, or a choice in it is unknown: a rule, or the name of a transform, of a
            network or of a metric.
    """
    found = protocol(name)
    if isinstance(name, str):
        return found
    if found.transform != NATIVE:
        registry.lookup(TRANSFORMS, found.transform, "transform")
    registry.lookup(networks.FEATURE_NETWORKS, found.network, "feature network", networks.GROUP)
    for network in found.lpips:
        registry.lookup(NETWORKS, network, "LPIPS network")
    for metric in (*found.reconstruction, *found.generation):
        registry.lookup(METRICS, metric, "metric", GROUP)
    return found
