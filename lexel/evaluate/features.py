"""What a feature network is shown of a batch, and what is kept of what it saw."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexel import networks
from lexel.metrics import Protocol, contiguous_splits, deal, shuffled
from lexel.metrics.pixels import on_unit_scale
from lexel.networks import FeatureNetwork, Features
from lexel.runtime import Runtime, cache_folder

OFFLINE = "efficientnet_lite0"  # stands in where FID's Inception is not at hand; a package carries its weights
GROUPS = 10  # of samples, each left out once for the confidence intervals


class Plan(NamedTuple):
    """Where each sample number belongs: a function of the numbers alone."""

    group: Tensor  # int64 (N,): left out together, for the intervals
    split: Tensor  # int64 (N,): of the inception score
    splits: int

    @classmethod
    def of(cls, count: int, protocol: Protocol) -> "Plan":
        rule = protocol.score
        split = contiguous_splits(count, rule.splits, rule.split_size)
        split = shuffled(split, seed=0) if rule.shuffle else split
        return cls(deal(count, GROUPS), split, int(split.max()) + 1 if count else 1)


def network_for(
    protocol: Protocol, name: str | None, path: str | Path | None, where: Runtime, warnings: list[str]
) -> FeatureNetwork:
    """The network asked for; else the protocol's, if its weights are here; else the offline one, with a word on it."""
    if name is None:
        at_hand = protocol.network != "inception" or path is not None or _cached("inception")
        name = protocol.network if at_hand else OFFLINE
        if not at_hand:
            warnings.append(
                f"protocol {protocol.name!r} looks through {protocol.network}, whose weights are not here: numbers are"
                f" of {name} and carry its name; give the weights file to get the published ones"
            )
    own = name == protocol.network  # the protocol's choices are about its own network
    bias = protocol.score.bias if own else None
    built = networks.build(name, path, protocol.resize if own else None, bias).to(where.device)
    # On a CPU this layout is the faster one, most of all for depthwise convolutions.
    return built.to(memory_format=torch.channels_last) if where.device.type == "cpu" else built  # type: ignore[call-overload]


def _cached(name: str) -> bool:
    return (cache_folder() / "networks" / f"{name}.safetensors").is_file()


def described(network: FeatureNetwork | None) -> dict[str, Any] | None:
    """What of a network decides its numbers, as plain data."""
    if network is None:
        return None
    return {
        "name": network.name,
        "fingerprint": network.fingerprint,
        "dims": network.dims,
        "resize": network.resize_rule,
        "logit_bias": network.logit_bias,
    }


def look(
    states: dict[str, Any],
    side: str,
    extractor: FeatureNetwork | None,
    protocol: Protocol,
    images: Tensor,
    numbers: Tensor,
    plan: Plan,
) -> None:
    """Shows images to the network and adds what it sees to the states of this side (`made.pooled`, `real.pooled`, ...).

    Args:
        states: by `side.part`; parts are `pooled`, `spatial`, `score` and `bank`, any of them may be missing.
        side: real or made.
        images: (B, 3, H, W) in [-1, 1].
        numbers: int64 (B,), of the samples.
    """
    mine = {name.removeprefix(f"{side}."): state for name, state in states.items() if name.startswith(f"{side}.")}
    if extractor is None or not mine:
        return
    features = see(extractor, shown(images, protocol))
    group = plan.group[numbers]
    if "pooled" in mine:
        mine["pooled"].add(features.pooled, group)
    if "spatial" in mine:
        mine["spatial"].add(features.spatial, group)
    if "score" in mine:
        mine["score"].add(features.logits, plan.split[numbers], group)
    if "bank" in mine:
        mine["bank"].add(features.pooled, numbers)


def see(extractor: FeatureNetwork, images: Tensor) -> Features:
    """What the network sees in images; on a CPU a few at a time, which its caches hold: 2.2 times as fast as 32."""
    if images.device.type != "cpu":
        return extractor(images)
    parts = [extractor(part) for part in images.split(4)]
    spatial = None if parts[0].spatial is None else torch.cat([part.spatial for part in parts])
    return Features(torch.cat([part.pooled for part in parts]), torch.cat([part.logits for part in parts]), spatial)


def shown(images: Tensor, protocol: Protocol) -> Tensor:
    """Images in [-1, 1] as the protocol lets a network see them: clamped, and on the levels of a file if it says so."""
    return on_unit_scale(images, protocol.rounding) * 2 - 1


def reference_choices(protocol: Protocol) -> dict[str, Any]:
    """What of a protocol decides the statistics of its real side."""
    names = ("transform", "size", "rounding")
    return {name: getattr(protocol, name) for name in names}
