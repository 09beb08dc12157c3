"""Batches of tokens for a generator: from a token set, or from images that a tokenizer encodes on the way."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lexel.conditions import Condition
from lexel.data import Batch, ImageSet, training_batches
from lexel.data.captions import Captions, stored
from lexel.data.config import open_data
from lexel.data.pace import Pace
from lexel.data.tokens import TokenBatch, TokenSet
from lexel.errors import UsageError, some
from lexel.generators import NetworkConfig
from lexel.loading import load_tokenizer
from lexel.runtime import Runtime
from lexel.spacing import evenly_spaced
from lexel.text_encoder import TextEncoder, caption_features
from lexel.train.generator_recipe import GeneratorRecipe, GeneratorTrainConfig, TokensConfig
from lexel.train.validation import SpacedImages

Labelled = TypeVar("Labelled", ImageSet, TokenSet)

COUNTED = 100_000  # images, spread over the set, whose tokens make the histogram: more would not change its entropy


class TokenSource:
    """Batches of tokens to learn from and to measure on.

    Attributes:
        names: of the images to learn from ("training") and to measure on ("validation").
        fingerprint: of the tokenizer; None if it is not known.
        tokenizer: the tokenizer, if the recipe names one.
        class_names: or None.
        unreadable: images that could not be used so far, and why.
        histogram_bits: entropy of the unigram distribution, in bits per token. None until it is measured.
    """

    def __init__(self, recipe: GeneratorRecipe, runtime: Runtime) -> None:
        data, self.runtime = recipe.data, runtime
        self.tokenizer = None if data.tokenizer is None else load_tokenizer(data.tokenizer).to(runtime.device)
        self.training: TokenSet | None = None
        self.histogram_bits: float | None = None
        self.unreadable: dict[str, str] = {}
        self.pace: Pace | None = None  # of reading images
        self.workers = 0  # processes that read images
        if data.tokens is not None:
            self._open_tokens(data, recipe.generator)
        else:
            self._open_images(data, recipe.generator)

    def _open_tokens(self, data: TokensConfig, model: NetworkConfig) -> None:
        assert data.tokens is not None
        tokens = TokenSet.open(data.tokens)
        if isinstance(data.validation, str):
            self.training, self.validation = tokens, TokenSet.open(data.validation)
            self.validation.require(tokens.fingerprint)
            if self.validation.grid != tokens.grid:
                raise UsageError(
                    f"{self.validation.folder} has grids {self.validation.grid}, {tokens.folder} {tokens.grid}; "
                    "encode both at one size"
                )
            self.validation = _numbered_alike(tokens, self.validation, str(self.validation.folder))
        else:
            self.training, self.validation = tokens.hold_out(data.validation)
        if self.tokenizer is not None:
            tokens.require(self.tokenizer.fingerprint())
        classes = tokens.classes if tokens.labels is not None else None
        model.check_fits(tokens.token_spec, classes, str(tokens.folder))
        first = [each.features(range(min(1, len(each)))) for each in (tokens, self.validation)]
        _require_captions(model, first)
        self.names: dict[str, Sequence[str]] = {"training": self.training.names, "validation": self.validation.names}
        if of_captions(model) and tokens.captions_fingerprint:
            self.names["captions"] = [tokens.captions_fingerprint]
        self.fingerprint, self.class_names = tokens.fingerprint, None if classes is None else list(classes)
        counted = self.training.subset(evenly_spaced(len(self.training), COUNTED))
        self.histogram_bits = entropy_bits(counted.histogram())

    def _open_images(self, data: TokensConfig, model: NetworkConfig) -> None:
        assert data.images is not None
        assert self.tokenizer is not None
        self.images, self.image_validation = open_data(data.images)
        self.image_validation.first_readable("validation images")
        self.data, self.transform, self.workers = data.images, data.images.make_transform(), data.images.workers
        spec = self.tokenizer.token_spec(data.images.size, data.images.size)
        self.image_validation = _numbered_alike(self.images, self.image_validation, "the validation set")
        classes = None if self.images.labels is None else list(self.images.classes)
        model.check_fits(spec, classes, data.images.source)
        captions: str | TextEncoder | None = data.captions
        if data.text_encoder is not None:
            captions = TextEncoder(data.text_encoder, data.caption_length, self.runtime)
        source, sets = data.images.source, (self.images, self.image_validation)
        self.captions, self.validation_captions = (caption_features(captions, each, source) for each in sets)
        _require_captions(model, [_stored(self.captions, [0]), _stored(self.validation_captions, [0])])
        self.names = {"training": self.images.names, "validation": self.image_validation.names}
        if self.captions is not None:
            self.names["captions"] = [self.captions.fingerprint()]
        self.fingerprint, self.class_names = self.tokenizer.fingerprint(), classes

    def batches(self, config: GeneratorTrainConfig, first: int, rank: int, processes: int) -> Iterator[TokenBatch]:
        """An endless iterator from step `first`; a batch is a function of (seed, step) alone."""
        if self.training is not None:
            yield from self.training.training_batches(config.batch_size, config.seed, first, rank, processes)
        share = {"rank": rank, "processes": processes, **self.data.loading}
        batches = training_batches(self.images, self.transform, config.batch_size, config.seed, first, **share)
        self.pace = batches.pace
        for batch in batches:
            self.unreadable.update(batches.unreadable)
            yield self._encoded(batch, self.captions)

    def measured(self, batch_size: int, limit: int | None, rank: int, processes: int) -> Iterator[TokenBatch]:
        """Every validation image of this process once; with a limit so many of them all, evenly spaced."""
        if self.training is not None:
            tokens = self.validation.subset(evenly_spaced(len(self.validation), limit))
            yield from tokens.ordered_batches(batch_size, rank, processes)
            return
        places = SpacedImages(self.image_validation, self.transform, limit, self.workers, self.data.on_error)
        for batch in places.read(range(len(places))[rank::processes], batch_size):
            yield self._encoded(batch, self.validation_captions)
        self.unreadable.update(places.unreadable)

    def conditions(self, condition: Condition, count: int, seed: int) -> Any:
        """Conditions of samples to be measured: every class as often, in a random order; held-out captions.

        Args:
            condition: of the generator.
            count: of samples.
            seed: of the order.
        """
        if condition.kind in ("none", "class"):
            shown = condition.shown(count)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            return shown if isinstance(shown, int) else shown[order]
        rows = torch.cat([condition.of_batch(batch) for batch in self.measured(count, count, 0, 1)])
        return rows[torch.arange(count) % len(rows)]

    @torch.no_grad()
    def _encoded(self, batch: Batch, captions: Captions | None) -> TokenBatch:
        assert self.tokenizer is not None
        with self.runtime.autocast():
            indices = self.tokenizer.tokens(self.tokenizer.latents(batch.images.to(self.runtime.device)))
        features = None if captions is None else _stored(captions, batch.numbers.tolist())  # which waits for the device
        return TokenBatch(indices, batch.labels, batch.numbers, features)


def _stored(captions: Captions | None, numbers: Sequence[int]) -> Tensor | None:
    """Features of captions as a token set keeps them, float16 (n, length, channels); None without captions."""
    return None if captions is None else torch.from_numpy(stored(captions, numbers))


def of_captions(model: NetworkConfig) -> bool:
    """Whether images are generated from features of captions."""
    return model.condition is not None and model.condition.get("kind") == "text"


def _require_captions(model: NetworkConfig, first: Sequence[Tensor | None]) -> None:
    """Refuses, before anything begins, a text condition without captions, or with others than it takes.

    Args:
        model: the network.
        first: the features (n, length, channels) of a caption of each set; None where there are none.
    """
    if not of_captions(model):
        return
    with torch.random.fork_rng(devices=[]):  # the weights of this condition are not the run's
        condition = model.make_condition(1)
    for features in first:
        condition.of_batch(TokenBatch(torch.zeros(0, dtype=torch.long), None, torch.zeros(0), features))


def _numbered_alike(training: Labelled, validation: Labelled, source: str) -> Labelled:
    """The validation set, its labels numbered as the training set numbers the classes of the same names.

    Raises:
        UsageError: the validation set has a class that the training set does not know, or labels on one side only.
    """
    if (training.labels is None) != (validation.labels is None):
        with_labels, without = ("validation", "training") if training.labels is None else ("training", "validation")
        raise UsageError(f"the {with_labels} set has labels, the {without} set ({source}) has none; label both or none")
    if training.labels is None or training.classes == validation.classes:
        return validation
    unknown = [name for name in validation.classes if name not in training.classes]
    if unknown:
        raise UsageError(
            f"{source} has classes that the training set does not know: {some(unknown, 5)}; validate on images of its "
            f"classes ({some(training.classes, 5)})"
        )
    return validation.with_classes(training.classes)


def entropy_bits(histogram: Tensor) -> float:
    """Entropy of counts (K,), in bits."""
    shares = histogram.double() / histogram.sum().clamp(min=1)
    return float(-(shares * shares.clamp(min=1e-300).log2()).sum())
