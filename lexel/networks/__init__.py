"""Pretrained networks that losses and metrics look at images with. A new feature network is one file and one line."""

from pathlib import Path

from lexel.errors import unknown
from lexel.networks.efficientnet_lite0 import EfficientNetLite0
from lexel.networks.features import FeatureNetwork, Features
from lexel.networks.inception import Inception
from lexel.networks.random import Random

FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    network.name: network for network in (EfficientNetLite0, Inception, Random)
}


def build(
    name: str, weights: str | Path | None = None, resize: str | None = None, logit_bias: bool | None = None
) -> FeatureNetwork:
    """A frozen feature network, on the CPU.

    Args:
        name: a key of FEATURE_NETWORKS.
        weights: the published weights file; by default the cached one, then the installed package's.
        resize: how images reach the network's side, a key of `lexel.networks.resize.RESIZE`; by default the network's.
        logit_bias: whether logits include the classifier's bias; by default as the network's scores are published.

    Raises:
        UsageError: the name or the rule is unknown, or the weights are not found or not the published ones.
    """
    if name not in FEATURE_NETWORKS:
        raise unknown("feature network", name, FEATURE_NETWORKS)
    network = FEATURE_NETWORKS[name]
    return network(network.load(weights), resize, logit_bias)


__all__ = ["FEATURE_NETWORKS", "FeatureNetwork", "Features", "build"]
