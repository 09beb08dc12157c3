"""Evaluations that a recipe lists to be run while it trains."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from lexel.config import Config

if TYPE_CHECKING:
    from lexel.evaluate import ImageTokenizer, Options  # imported where it is used: most recipes list none


class EvaluationConfig(Config):
    """One `[[train.evaluations]]` table: what is measured, on what, and how often."""

    data: str  # the real images: a folder, or a source such as photos
    every: int = Field(ge=1)  # steps
    split: str | None = None
    protocol: str = "lexel"
    metrics: list[str] | None = None  # of lexel.evaluate.METRICS; the protocol's by default
    size: int | Literal["native"] | None = None  # the protocol's by default
    network: str | None = None
    weights: str | None = None  # a file, of the network
    limit: int | None = Field(default=None, ge=2)  # images, evenly spaced

    def check(self) -> None:
        """Looks the names up, so that a typing error ends a training before it begins.

        Raises:
            UsageError: there is no such protocol, metric or feature network.
        """
        from lexel import networks, registry
        from lexel.evaluate.metrics import wanted
        from lexel.evaluate.rules import find_protocol

        rules = find_protocol(self.protocol)
        wanted(rules.reconstruction if self.metrics is None else self.metrics)
        if self.network is not None:
            registry.lookup(networks.FEATURE_NETWORKS, self.network, "feature network", networks.GROUP)

    def run(self, tokenizer: "ImageTokenizer", options: "Options | None" = None) -> dict[str, Any]:
        """The result of `evaluate_tokenizer`; every process calls it, and gets the same. No random state changes.

        Raises:
            UsageError: as `evaluate_tokenizer`.
        """
        from lexel.evaluate import Options, evaluate_tokenizer

        with torch.random.fork_rng(devices=[]):
            return evaluate_tokenizer(
                tokenizer,
                self.data,
                self.protocol,
                split=self.split,
                size=self.size,
                metrics=self.metrics,
                network=self.network,
                weights=self.weights,
                options=(options or Options()).changed({"limit": self.limit}),
            )
