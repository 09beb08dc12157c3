"""The base of every generator: a model of the tokens of images, p(tokens | condition).

A family writes what it learns from (`losses`), its likelihood where it has one (`nll`) and how it samples (`_sample`).
Everything else is here, once: conditions, the layout of tokens, random numbers that belong to an image and not to a
batch, batches that fit into memory, given tokens, and folders.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel import registry
from lexel.conditions import Condition
from lexel.config import Config as BaseConfig
from lexel.config import check
from lexel.errors import UsageError
from lexel.generators.batch import SampleBatch, for_each, free_bytes, reporter
from lexel.generators.config import GeneratorConfig, NetworkConfig, family_of
from lexel.generators.pretrained import WithTokenizer
from lexel.generators.pruning import pruned
from lexel.generators.sampling import check_filters, guidance_scales
from lexel.runtime import ProgressCallback, at_least_float32
from lexel.token_spec import TokenSpec

SETTINGS = {"cfg_scale", "cfg_schedule", "temperature", "top_k", "top_p", "min_p"}  # that all families take
FREE = -1  # in `given`: a token to be sampled


class Predicted(NamedTuple):
    """Predictions of every token."""

    logits: tuple[Tensor, ...]  # (B, T, V) for each sub-vocabulary, one for a plain head
    nll: Tensor | None  # (B, T) float, -log p(token) in nats; None where the family has no likelihood


class NoOptions(BaseConfig):
    """A family that samples in one way."""


class Generator(WithTokenizer):
    """A model of the tokens of images, given a condition. `Generator(config)` is of the family that the config names.

    Args:
        config: the network and what its tokens mean.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config: ClassVar[type[NetworkConfig]]
    SampleOptions: ClassVar[type[BaseConfig]] = NoOptions
    has_likelihood: ClassVar[bool] = True  # whether `nll` is defined
    transformer: Any  # the family's network; it has `condition` and takes `checkpointing`

    def __new__(cls, config: GeneratorConfig | None = None) -> "Generator":
        if cls is not Generator:
            return super().__new__(cls)
        if config is None:
            raise UsageError("a generator needs a GeneratorConfig")
        return super().__new__(family_of(config.transformer))

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.transformer = self.build(config.transformer)
        names, classes = config.class_names, getattr(self.condition, "classes", None)
        if names is not None and classes is not None and len(names) != classes:
            raise UsageError(f"{len(names)} class names for {classes} classes")

    # ------------------------------------------------------------------------------------------ what a family writes

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        """The family's network, freshly initialised, with `condition` and `checkpointing`."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, condition: Tensor) -> Any:
        """Logits and negative log-likelihood of every token, a `Predicted`; where there is no likelihood, the losses.

        Args:
            tokens: int64 (B, *grid) or (B, T), in [0, codebook_size). Values are not checked: that would wait for the
                device.
            condition: (B, ...), as `condition.check` makes it. In training it is dropped to the null condition at
                random.

        Raises:
            UsageError: a shape does not fit.
        """
        return self.losses(tokens, condition)

    def losses(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """The terms that training adds up, each a mean over the batch; by default `nll`, that of a token in nats."""
        nll = self.nll(tokens, condition)
        assert nll is not None, "a family without a likelihood has losses of its own"
        return {"nll": nll.mean()}

    def anneal(self, progress: float) -> None:
        """Sets the share of training that is done, before each step; for families that change what they learn."""

    def nll(self, tokens: Tensor, condition: Tensor) -> Tensor | None:
        """Negative log-likelihood of every token in nats, (B, T); an upper bound where the family says so, or None."""
        return cast(Tensor, self.forward(tokens, condition).nll) if self.has_likelihood else None

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        """Hidden states (B, rows, C): features of an image, for `lexel probe`.

        A row is a token, or what the network takes for one: a patch of latents, or a position with all its codes.

        Args:
            tokens: int64 (B, *grid) or (B, T), in range; latents (B, channels, *grid) of a continuous tokenizer.
            condition: (B, ...), checked.
            layers: states after so many blocks; the family's choice by default.

        Raises:
            UsageError: the family has no such states, or not so many blocks.
        """
        raise UsageError(
            f"a {self.config.transformer.kind} generator has no hidden states of given tokens; "
            "its class does not define `hidden`"
        )

    def _sample(self, batch: SampleBatch) -> Tensor:
        """Tokens (B, T) in [0, codebook_size) for one batch that fits into memory."""
        raise NotImplementedError

    def decisions(self, options: Any) -> int:
        """Over how many decisions a guidance schedule runs: tokens, or steps."""
        return self.config.transformer.tokens

    def bytes_per_image(self, options: Any, dtype: torch.dtype | None, guided: bool) -> int:
        """Memory that sampling one image needs, without the weights."""
        raise NotImplementedError

    def held_bytes(self) -> int:
        """Memory that the last call still holds and the next may use."""
        return 0

    def prune(self, kept: Tensor) -> "Generator":
        """The same generator over the codes `kept` (n,) alone, without a tokenizer: heads and embeddings are cut.

        Raises:
            UsageError: the family's weights do not follow its codes one by one.
        """
        return pruned(self, kept)

    @property
    def sub_tokens(self) -> int:
        """Draws that make one token: 1, or 2 with a factorised head."""
        return 1

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the network sees the vectors of codes, which the tokenizer has."""
        return False

    def layers(self) -> list[nn.Module]:
        """The parts that are sharded, and recomputed, one by one."""
        return [*self.transformer.blocks]

    # ------------------------------------------------------------------------------------------ what all share

    @property
    def condition(self) -> Condition:
        """The module of the condition."""
        return cast(Condition, self.transformer.condition)

    @property
    def settings(self) -> Any:
        """The family's options; a family says of which class they are."""
        return self.config.transformer

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of an image's tokens."""
        return self.config.transformer.shape

    @property
    def sampled_shape(self) -> tuple[int, ...]:
        """The shape of one sampled image: the grid of its tokens."""
        return self.grid

    def nothing(self, count: int) -> Tensor:
        """Tokens of so many images that mean nothing, for processes that have run out of images."""
        return torch.zeros(count, *self.sampled_shape, dtype=torch.long, device=self.device)

    @property
    def token_spec(self) -> TokenSpec:
        """The layout of an image's tokens."""
        return self.config.transformer.token_spec

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses settings of `sample` that it does not take, before there is a generator.

        Raises:
            UsageError: a name is unknown, or a value of a wrong type.
        """
        shared = inspect.signature(cls.sample, eval_str=True).parameters
        for name in settings.keys() & SETTINGS:
            if not registry.fits(settings[name], shared[name].annotation):
                raise UsageError(f"sampling: {name} = {settings[name]!r} is not what it takes; see Generator.sample")
        own = {name: value for name, value in settings.items() if name not in SETTINGS}
        check(own, cls.SampleOptions, f"sampling from a {cls.Config.model_fields['kind'].default} generator")

    @torch.no_grad()
    def sample(
        self,
        condition: Any,
        cfg_scale: float | Sequence[float] = 1.0,
        cfg_schedule: str = "constant",
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        image_numbers: Sequence[int] | Tensor | None = None,
        given: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        progress: ProgressCallback | None = None,
        watch: Callable[[Tensor], None] | None = None,
        **options: Any,
    ) -> Tensor:
        """New images, as tokens: int64 (B, *grid).

        An image is a function of (weights, condition, settings, seed, image number): neither the batch it is made in
        nor the number of processes changes its random numbers. In float64 it is the same token for token; in float32
        and below, another batch size may round logits differently, and a token whose draw lies that near to an edge
        flips.

        Args:
            condition: class labels (B,), features of captions (B, length, features), or how many images; see
                `lexel.conditions`.
            cfg_scale: guidance, unconditional + scale (conditional - unconditional); 1 is off and costs nothing.
                A factorised vocabulary takes one for each sub-token too.
            cfg_schedule: how the scale runs over the image: see `lexel.generators.sampling.guidance_scales`.
            temperature: divides the logits; for each sub-token likewise.
            top_k: samples of the k likeliest tokens; 0 is off, 1 is greedy.
            top_p: samples of the likeliest tokens that hold p of the probability; 1 is off.
            min_p: samples of tokens at least min_p times as probable as the likeliest; 0 is off.
            seed: of the random numbers, with the image's number.
            image_numbers: (B,) names of the images in the random stream; 0 to B - 1 by default. A part of a larger set
                gives the numbers its images have there.
            given: (B, *grid) tokens that stay as they are; -1 where tokens are to be sampled.
            dtype: of weights, caches and arithmetic while sampling; the parameters' own by default.
            batch_size: the most images at once; what fits into memory by default.
            progress: called with tokens done and tokens in all.
            watch: called as often, with the tokens (b, T) of the batch under way, FREE where there is none yet; only
                families that write token after token fill them in.
            options: the family's own, its `SampleOptions`; None is as if not given.

        Raises:
            UsageError: an argument is out of range.
        """
        network, parts = self.config.transformer, self.sub_tokens
        prepared = self.condition.check(condition)
        count = len(prepared)
        numbers = list(range(count)) if image_numbers is None else [int(number) for number in image_numbers]
        if len(numbers) != count:
            raise UsageError(f"{len(numbers)} image_numbers for {count} images to sample")
        if given is None:
            tokens = torch.full((count, network.tokens), FREE, device=prepared.device)
        else:
            tokens = self.check_tokens(given, lowest=FREE).to(prepared.device)
            if len(tokens) != count:
                raise UsageError(f"{len(tokens)} images given for {count} to sample")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        chosen = {name: value for name, value in options.items() if value is not None}
        own = check(chosen, self.SampleOptions, f"sampling from a {network.kind} generator")
        temperatures = for_each(temperature, parts, "temperature")
        for value in temperatures:
            check_filters(value, top_k, top_p, min_p)
        filters = [{"temperature": value, "top_k": top_k, "top_p": top_p, "min_p": min_p} for value in temperatures]
        decisions = self.decisions(own)
        scales = [guidance_scales(cfg_schedule, scale, decisions) for scale in for_each(cfg_scale, parts, "cfg_scale")]
        guided = any(scale != 1 for each in scales for scale in each)
        if guided and not self.condition.guided:
            raise UsageError(f"condition {self.condition.kind!r} has nothing to guide by; leave cfg_scale at 1")

        size = batch_size or max(
            1, free_bytes(self.device, self.held_bytes()) // 2 // self.bytes_per_image(own, dtype, guided)
        )
        done = []
        for begin in range(0, count, size):
            end = min(begin + size, count)
            rows, part = prepared[begin:end], tokens[begin:end].clone()
            batch = SampleBatch(
                condition=rows,
                null=self.condition.null(rows) if guided else None,
                tokens=part,
                scales=scales,
                filters=filters,
                seed=seed,
                numbers=numbers[begin:end],
                options=own,
                dtype=dtype,
                report=reporter(progress, watch, part, begin, count),
            )
            done.append(self._sample(batch))
            batch.report(1.0)
        return torch.cat(done).view(count, *self.sampled_shape) if done else tokens.new_zeros(0, *self.sampled_shape)

    def flat(self, tokens: Tensor) -> Tensor:
        """Tokens (B, *grid) or (B, T) in raster order, int64 (B, T); only shape and type are checked, without a wait.

        Raises:
            UsageError: the shape is another, or they are no integers.
        """
        shapes = (self.grid, (self.config.transformer.tokens,))
        if tuple(tokens.shape[1:]) not in shapes or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            wanted = ", ".join(["B", *map(str, self.grid)])
            raise UsageError(f"tokens must be integers ({wanted}), got {tokens.dtype} {tuple(tokens.shape)}")
        return tokens.flatten(1).long()

    def check_tokens(self, tokens: Tensor, lowest: int = 0) -> Tensor:
        """`flat`, with every value checked to be in [lowest, codebook_size): for public doors.

        Raises:
            UsageError: a shape, type or value does not fit.
        """
        flat = self.flat(tokens)
        if flat.numel():
            low, high = (int(bound) for bound in flat.aminmax())
            size = self.config.transformer.codebook_size
            if low < lowest or high >= size:
                raise UsageError(f"tokens must be in [{lowest}, {size}), got {low if low < lowest else high}")
        return flat

    def class_numbers(self, names: Sequence[str]) -> list[int]:
        """The numbers of classes given by number or by label.

        Raises:
            UsageError: a number is out of range, no class has that label, or there are no classes.
        """
        classes, known = getattr(self.condition, "classes", None), self.config.class_names or []
        if classes is None:
            raise UsageError(f"this generator has no classes; its condition is {self.condition.kind!r}")
        numbers = []
        for name in names:
            if name in known:
                numbers.append(known.index(name))
            elif name.isdecimal() and int(name) < classes:
                numbers.append(int(name))
            else:
                near = [label for label in known if name.lower() in label.lower()][:5]
                hint = f"; labels like it are {', '.join(near)}" if near else ""
                raise UsageError(
                    f"no class {name!r}; classes are 0 to {classes - 1}{' or a label' * bool(known)}{hint}"
                )
        return numbers


def cross_entropy(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy (B, T) in nats of tokens (B, T) under logits (B, T, V), in at least float32."""
    wide = at_least_float32(logits).flatten(0, 1)
    return F.cross_entropy(wide, tokens.flatten(), reduction="none", label_smoothing=label_smoothing).view(tokens.shape)


class TrainingLosses(nn.Module):
    """A generator whose forward pass is its losses: what DistributedDataParallel wraps."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """`generator.losses`."""
        return self.generator.losses(tokens, condition)
