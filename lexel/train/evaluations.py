"""Evaluations that a recipe lists to be run while it trains."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from lexel import provenance
from lexel.config import Config
from lexel.distributed import gather
from lexel.errors import UsageError
from lexel.regular import expanded

if TYPE_CHECKING:  # imported where they are used: most recipes list none
    from lexel.data.config import DataConfig
    from lexel.evaluate import ImageTokenizer, Options
    from lexel.generators import Generator
    from lexel.train.processes import Processes
    from lexel.train.tokens import TokenSource


class Evaluation(Config):
    """An evaluation during training (`[[train.evaluations]]`): metrics, data, and how often."""

    MEASURES: ClassVar[str]  # the metrics of a protocol that are taken by default: a field of Protocol

    data: str  # the real images: a folder, or a source such as photos
    every: int = Field(ge=1)  # steps
    split: str | None = None
    protocol: str = "lexel"
    metrics: list[str] | None = None  # of lexel.evaluate.METRICS; the protocol's by default
    network: str | None = None
    weights: str | None = None  # a file, of the network

    def check(self) -> None:
        """Looks the names up, so that a typing error ends a training before it begins.

        Raises:
            UsageError: there is no such protocol, metric or feature network.
        """
        from lexel import networks, registry
        from lexel.evaluate.metrics import wanted
        from lexel.evaluate.rules import find_protocol

        rules = find_protocol(self.protocol)
        wanted(getattr(rules, self.MEASURES) if self.metrics is None else self.metrics)
        if self.network is not None:
            registry.lookup(networks.FEATURE_NETWORKS, self.network, "feature network", networks.GROUP)

    def open(self, pixel_limit: int) -> None:
        """Opens the real images once.

        Raises:
            UsageError: they are not there, or have no such split.
        """
        from lexel.evaluate.sources import ARRAYS, open_set

        path = expanded(self.data)
        if path.suffix not in ARRAYS:
            open_set(self.data, self.split, None, pixel_limit=pixel_limit)
        elif not path.is_file():
            raise UsageError(f"train.evaluations: {self.data} is not a file")

    def chosen(self) -> dict[str, Any]:
        """The arguments of `evaluate_tokenizer` and `evaluate_samples` that it decides."""
        return {name: getattr(self, name) for name in ("protocol", "split", "metrics", "network", "weights")}

    def named(self, result: dict[str, Any]) -> dict[str, float | None]:
        """The numbers of a result, by metric and data: "psnr (photos)"."""
        source = provenance.public_name(self.data)
        return {f"{name} ({source})": value for name, value in result["metrics"].items()}


def while_training(
    evaluations: Sequence[Evaluation], processes: "Processes", batch_size: int, data: "DataConfig | None"
) -> "Options":
    """Options of evaluations during training: its device, and its own images, if it has any.

    Raises:
        UsageError: the images of an evaluation are not there, which is told before the training begins.
    """
    from lexel.evaluate import Options

    options = Options(batch_size=batch_size, device=str(processes.device))
    if data is not None:
        options = options.changed({"workers": data.workers, "pixel_limit": data.pixel_limit})
    for evaluation in evaluations:
        evaluation.open(options.pixel_limit)
    return options


class EvaluationConfig(Evaluation):
    """One `[[train.evaluations]]` table of a tokenizer's recipe."""

    MEASURES: ClassVar[str] = "reconstruction"

    size: int | Literal["native"] | None = None  # the protocol's by default
    limit: int | None = Field(default=None, ge=2)  # images, evenly spaced

    def run(self, tokenizer: "ImageTokenizer", options: "Options | None" = None) -> dict[str, Any]:
        """The result of `evaluate_tokenizer`; every process calls it, and gets the same. No random state changes.

        Raises:
            UsageError: as `evaluate_tokenizer`.
        """
        from lexel.evaluate import Options, evaluate_tokenizer

        options = (options or Options()).changed({"limit": self.limit})
        with torch.random.fork_rng(devices=[]):
            return evaluate_tokenizer(tokenizer, self.data, size=self.size, options=options, **self.chosen())


class SampleEvaluationConfig(Evaluation):
    """One `[[train.evaluations]]` table of a generator's recipe: samples of so many images are measured."""

    MEASURES: ClassVar[str] = "generation"

    images: int = Field(default=1000, ge=2)  # as many of each class, if there are classes, in a random order
    sampling: dict[str, Any] = {}  # settings of `Generator.sample`: cfg_scale, top_p, steps, ...

    def check(self) -> None:
        super().check()
        from lexel.evaluate.metrics import wanted

        for name, metric in wanted(self.metrics or ()).items():
            lacking = metric.needs & {"originals", "indices", "latents"}
            if lacking:
                raise UsageError(f"{name} needs {' and '.join(sorted(lacking))}, which samples do not have")

    def run(
        self,
        generator: "Generator",
        source: "TokenSource",
        seed: int,
        processes: "Processes",
        options: "Options",
    ) -> dict[str, Any]:
        """The result of `evaluate_samples`; every process samples its share, and gets the same result.

        Args:
            generator: samples; the images are the same on any number of processes.
            source: of the tokens it learns from, with their tokenizer.
            seed: of the random numbers.
            processes: share the images.
            options: of the evaluation.

        Raises:
            UsageError: as `Generator.sample` and `evaluate_samples`.
        """
        from lexel.data import ArrayImages
        from lexel.evaluate import evaluate_samples
        from lexel.samples import cut, sampled_images

        assert source.tokenizer is not None
        condition = source.conditions(generator.condition, self.images, seed)
        begin, end = (rank * self.images // processes.count for rank in (processes.rank, processes.rank + 1))
        share = cut(condition, begin, end)
        settings = {"seed": seed, **self.sampling}
        with torch.random.fork_rng():
            mine = list(sampled_images(generator, share, processes.runtime, source.tokenizer, begin, **settings))
            made = np.concatenate([part for parts in gather(mine) for part in parts])
            names = [f"{number:06d}" for number in range(self.images)]
            return evaluate_samples(ArrayImages(made, names), self.data, options=options, **self.chosen())
