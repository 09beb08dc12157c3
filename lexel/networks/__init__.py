"""Pretrained networks behind losses and metrics. A new feature network is one file and one line, or an entry point."""

from pathlib import Path

from lexel import registry
from lexel.networks.efficientnet_lite import EfficientNetLite0, EfficientNetLite2
from lexel.networks.features import FeatureNetwork, Features
from lexel.networks.inception import Inception

GROUP = "lexel.networks"  # entry points of other packages

FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    network.name: network for network in (EfficientNetLite0, EfficientNetLite2, Inception)
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
    network = registry.lookup(FEATURE_NETWORKS, name, "feature network", GROUP)
    return network(network.load(weights), resize, logit_bias)


__all__ = ["FEATURE_NETWORKS", "FeatureNetwork", "Features", "build"]
