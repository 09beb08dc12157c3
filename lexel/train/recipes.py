"""Training recipes: the typed sections that both kinds share, and those of a tokenizer's TOML file."""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator
from torch import nn

from lexel import registry
from lexel.autoencoders import AUTOENCODERS
from lexel.config import Config
from lexel.data.config import DataConfig
from lexel.errors import UsageError
from lexel.losses import DISCRIMINATOR_LOSSES, DISCRIMINATORS, GENERATOR_LOSSES, discriminator, perturbation
from lexel.quantizers import QUANTIZERS
from lexel.runtime import without_weights
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train.evaluations import EvaluationConfig
from lexel.train.objective import Objective, image_terms

Precision = Literal["float32", "bf16", "fp16"]
Network = TypeVar("Network")
Beta = Annotated[float, Field(ge=0, lt=1)]


def refuse_unused(section: Config, names: tuple[str, ...], used: bool, needs: str) -> None:
    """Refuses options that differ from their defaults where nothing would read them."""
    fields = type(section).model_fields
    for name in names:
        if not used and getattr(section, name) != fields[name].default:
            raise ValueError(f"{name} has no effect without {needs}; leave it out")


def buildable(build: Callable[[], Network]) -> Network:
    """A network on the meta device, which holds no weights; UsageErrors are ValueErrors, so pydantic reports them."""
    with without_weights():
        try:
            return build()
        except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
            raise ValueError(f"the network cannot be built: {str(error).splitlines()[0]}") from None


def outline(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a configuration on the meta device, to be looked at, not changed: the last one is kept."""
    return _outline(config.model_dump_json())


@functools.lru_cache(maxsize=1)  # a recipe is checked, resolved, weighed and planned: four times the same network
def _outline(config: str) -> Tokenizer:
    with without_weights():
        return Tokenizer(TokenizerConfig.model_validate_json(config))


# ---------------------------------------------------------------------------------------------- shared by both loops


class Schedule(Config):
    """The learning rate over a run, as a factor of `lr`.

    Lengths are in the unit of the run: epochs where the recipe gives epochs, steps where it gives steps.
    """

    kind: Literal["constant", "steps", "linear", "cosine"] = "constant"
    warm_up: float = Field(default=0, ge=0)  # length of the linear rise to 1
    start: float = Field(default=0.0, ge=0, le=1)  # the factor at the first step of the rise
    drops: list[float] = []  # kind "steps": after each of these lengths the factor is multiplied by `drop`
    drop: float = Field(default=0.1, gt=0, lt=1)
    hold: float = Field(default=0.0, ge=0, lt=1)  # linear, cosine: the share of the rest that stays at 1
    end: float = Field(default=0.0, ge=0, le=1)  # linear, cosine: the factor at the last step

    @model_validator(mode="after")
    def _fits(self) -> "Schedule":
        if (self.kind == "steps") != bool(self.drops):
            raise ValueError('drops belong to kind = "steps", and that kind needs them')
        falls = self.kind in ("linear", "cosine")
        refuse_unused(self, ("hold", "end"), falls, 'kind = "linear" or "cosine"')
        refuse_unused(self, ("drop",), self.kind == "steps", 'kind = "steps"')
        refuse_unused(self, ("start",), self.warm_up > 0, "a warm_up")
        return self

    def factor(self, step: int, steps: int, unit: float = 1.0) -> float:
        """The factor for a step in [0, steps); `unit` is the number of steps in one of the run's lengths."""
        rise = self.warm_up * unit
        if step < rise:
            return self.start + (1 - self.start) * step / rise
        if self.kind == "steps":
            return math.prod(self.drop for length in self.drops if step >= round(length * unit))
        if self.kind == "constant":
            return 1.0
        progress = (step - rise) / max(steps - 1 - rise, 1)
        fall = min(max((progress - self.hold) / (1 - self.hold), 0.0), 1.0)
        if self.kind == "cosine":
            fall = (1 - math.cos(math.pi * fall)) / 2
        return 1 + (self.end - 1) * fall


class LoopConfig(Config):
    """The options that both training loops share."""

    REPLACES: ClassVar[dict[str, str]] = {"steps": "epochs", "epochs": "steps"}

    steps: int | None = Field(default=None, ge=1)  # either this
    epochs: int | None = Field(default=None, ge=1)  # or this
    batch_size: int = Field(ge=1)  # images of a step, over all processes and micro-batches
    accumulation: int = Field(default=1, ge=1)  # micro-batches into which each process splits its share of a batch
    lr: float = Field(gt=0)
    betas: list[Beta] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    schedule: Schedule = Schedule()
    clip: float | None = Field(default=None, gt=0)  # the largest norm of the gradient
    precision: Precision = "float32"
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=50, ge=1)  # steps
    validate_every: int = Field(default=1000, ge=1)  # steps
    validation_images: int | None = Field(default=None, ge=1)  # None is all of them
    save_every: int = Field(default=1000, ge=1)  # steps
    keep_last: int = Field(default=2, ge=1)  # checkpoints; the best one stays too
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []

    @model_validator(mode="after")
    def _loop(self) -> "LoopConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs (--set train.steps=none takes one away)")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation = {self.accumulation} does not divide batch_size = {self.batch_size}")
        return self


# ---------------------------------------------------------------------------------------------- tokenizers


class DiscriminatorConfig(Config):
    """The discriminator of the adversarial term; it trains where `weights.adversarial` is not 0."""

    start: float = Field(default=0, ge=0)  # it begins after this many epochs or steps, in the unit of the run's length
    kind: str = "patch"  # or blur: of the published pretrained tokenizers, at layers = 3 and width = 128; features
    layers: int = Field(default=3, ge=1, le=32)
    width: int = Field(default=64, ge=1)
    options: dict[str, Any] = {}  # further arguments of the kind: { network = "vgg16" } for kind = "features"
    loss: str = "hinge"
    generator_loss: str = "non_saturating_image"
    adaptive: bool = False  # multiplies weights.adversarial so that both gradients are equal at the last layer
    # The images whose gradients decide: "global", a micro-batch of all processes, the same on any number of them, or
    # "process", those of each, as published; the weight is then the mean over processes.
    adaptive_over: Literal["global", "process"] = "global"
    lecam: float = Field(default=0.0, ge=0)  # weight of the LeCAM term; 0 is off
    lecam_decay: float = Field(default=0.999, ge=0, lt=1)
    lr: float | None = Field(default=None, gt=0)  # None is the tokenizer's
    first: bool = True  # it learns before the tokenizer in each step (IBQ); false: after it (VQGAN)
    # The images over which batch norm takes its statistics: "process", those that a process takes at a time, or a
    # number, with the same result on any number of processes. Published runs have as many as one GPU took.
    statistics: Literal["process"] | Annotated[int, Field(ge=1)] = "process"

    @model_validator(mode="after")
    def _known(self) -> "DiscriminatorConfig":
        registry.lookup(DISCRIMINATOR_LOSSES, self.loss, "loss")
        registry.lookup(GENERATOR_LOSSES, self.generator_loss, "generator_loss")
        refuse_unused(self, ("lecam_decay",), self.lecam > 0, "lecam")
        refuse_unused(self, ("adaptive_over",), self.adaptive, "adaptive")
        network = registry.lookup(DISCRIMINATORS, self.kind, "discriminator", discriminator.GROUP)
        needs = f"batch norm, which kind = {self.kind!r} does not have"
        refuse_unused(self, ("statistics",), getattr(network, "batch_norm", True), needs)
        takes = inspect.signature(network).parameters
        refuse_unused(self, ("layers",), "layers" in takes, f"a kind that has layers, which {self.kind!r} has not")
        refuse_unused(self, ("width",), "width" in takes, f"a kind that has a width, which {self.kind!r} has not")
        buildable(self.build)
        return self

    def build(self) -> nn.Module:
        """The network."""
        network = registry.lookup(DISCRIMINATORS, self.kind, "discriminator", discriminator.GROUP)
        takes = inspect.signature(network).parameters
        sizes = {name: getattr(self, name) for name in ("layers", "width") if name in takes}
        twice = sorted(sizes.keys() & self.options.keys())
        if twice:
            raise UsageError(
                f"discriminator.options.{twice[0]} is an option of the discriminator itself; give it there"
            )
        return registry.build(network, self.kind, {**sizes, **self.options}, "discriminator")


class TrainConfig(LoopConfig):
    """Training options of a tokenizer."""

    betas: list[Beta] = Field(default=[0.5, 0.9], min_length=2, max_length=2)
    weights: dict[str, float] = {"l1": 1.0}  # of loss terms; the quantizer's default to its own LOSS_WEIGHTS
    lpips: Literal["vgg", "alex"] = "vgg"  # the network behind the term lpips
    losses: dict[
        str, dict[str, Any]
    ] = {}  # options of losses by their names in `weights`; `kind` is the name if absent
    perturbation: dict[str, Any] | None = None  # of codes on their way to the decoder: a kind and its options
    discriminator: DiscriminatorConfig | None = None
    average_decay: float = Field(default=0.999, ge=0, lt=1)
    average_warm_up: bool = False
    channels_last: bool = False
    shard_codebook: bool = False  # spread codes, their gradients, average and moments over the processes (vq, ibq)
    collapse_patience: int = Field(default=5, ge=0)  # validations in a row with one code in use that end a run; 0: none
    evaluations: list[EvaluationConfig] = []  # protocols to measure the averaged weights by, every so many steps

    @model_validator(mode="after")
    def _terms(self) -> "TrainConfig":
        if self.weights.get("adversarial") and self.discriminator is None:
            raise ValueError("weights.adversarial needs a section [train.discriminator]")
        if not any(self.weights.get(term) for term in ("l1", "l2", "lpips", "proxy_codes")):
            raise ValueError(
                "weights needs a reconstruction term: l1, l2 or lpips (proxy_codes in TiTok's first stage)"
            )
        if self.shard_codebook and self.precision == "fp16":
            raise ValueError("shard_codebook has no loss scaling; use precision bf16 or float32")
        for name in self.losses:
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == "adversarial":
                raise ValueError(f"losses.{name}: a loss is named in small letters, digits and _, and not adversarial")
            if name not in self.weights:
                raise ValueError(f"losses.{name} has no weight; give weights.{name} (0 switches it off)")
        by_weight = bool(self.weights.get("lpips")) and "lpips" not in self.losses
        needs = "weights.lpips" if "lpips" not in self.losses else "weights.lpips and no section losses.lpips"
        refuse_unused(self, ("lpips",), by_weight, needs)
        if self.perturbation is not None:
            perturbation.build(self.perturbation)
        for evaluation in self.evaluations:
            evaluation.check()
        micro_batch = self.batch_size // self.accumulation
        group = self.discriminator.statistics if self.discriminator is not None else "process"
        if group != "process" and micro_batch % group:
            raise ValueError(
                f"discriminator.statistics = {group} does not divide a micro-batch of {micro_batch} images"
            )
        return self


class InitConfig(Config):
    """The model a training starts from."""

    source: str  # a run, a tokenizer folder, a published checkpoint or a hub id
    what: Literal["all", "decoder", "codebook", "proxy"] = "all"  # see `lexel.train.initialise`


class TokenizerRecipe(Config):
    """All that decides a tokenizer: the network, the images, the training."""

    model: TokenizerConfig
    data: DataConfig
    train: TrainConfig
    init: InitConfig | None = None

    @model_validator(mode="after")
    def _buildable(self) -> "TokenizerRecipe":
        tokenizer = buildable(lambda: outline(self.model))
        try:
            tokenizer.grid(self.data.size, self.data.size)
        except UsageError as error:
            raise ValueError(f"data.size = {self.data.size} does not fit the autoencoder: {error}") from None
        if self.model.autoencoder.channels != self.data.channels:
            raise ValueError(
                f"data.channels = {self.data.channels} and model.autoencoder.channels = "
                f"{self.model.autoencoder.channels} must be equal"
            )
        weights = [kind.LOSS_WEIGHTS for kind in QUANTIZERS.values()]
        weights += [kind.LOSS_WEIGHTS for kind in AUTOENCODERS.values()]
        terms = {*image_terms(self.train)}
        known = {*terms, *(term for table in weights for term in table)}
        own = {*terms, *tokenizer.loss_weights}
        for name in self.train.losses:
            if name in tokenizer.loss_weights:
                raise ValueError(f"train.losses.{name} has the name of a term of the model; give it another")
        for term, weight in self.train.weights.items():
            if term not in known | own:
                raise ValueError(
                    f"train.weights has the unknown loss term {term!r}; choose from {', '.join(sorted(own))}"
                )
            if weight and term not in own:
                raise ValueError(
                    f"train.weights.{term} = {weight:g} has no effect: the model has no such loss term, only "
                    f"{', '.join(sorted(own - terms)) or 'none'} (--set train.weights.{term}=none)"
                )
        buildable(lambda: Objective(self.train, self.model, self.data.size))
        if self.train.perturbation is not None:
            check_perturbable(tokenizer)
        return self

    def resolved(self) -> "TokenizerRecipe":
        """With the weight of every loss term written out."""
        weights = {**outline(self.model).loss_weights, **self.train.weights}
        return self.model_copy(update={"train": self.train.model_copy(update={"weights": weights})})


def check_perturbable(tokenizer: Tokenizer) -> None:
    """Refuses quantizers whose tokens are not one code of one table for each place."""
    quantizer = tokenizer.quantizer
    one_table = quantizer.books is None and not tokenizer.continuous and tokenizer.autoencoder.shares is None
    if not one_table or quantizer.index_shape((2, 2)) != (2, 2):
        raise ValueError(
            "train.perturbation swaps codes of one table, one at each place, which this quantizer does not have"
        )
