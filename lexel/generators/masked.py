"""Masked generators: tokens are filled in over a few steps, the surest first (MaskGIT, https://arxiv.org/abs/2202.04200).

In training a random share of the tokens is masked and predicted from the rest; sampling starts with all of them
masked, predicts every one at each step and keeps those it is surest of. TiTok's generators
(https://arxiv.org/abs/2406.07550) are these, and MAGE's (https://arxiv.org/abs/2211.09117), which also drops tokens
from its encoder while it learns.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError
from lexel.generators.base import FREE, Generator, Predicted, cross_entropy
from lexel.generators.batch import SampleBatch
from lexel.generators.bidirectional import NETWORKS, Bidirectional
from lexel.generators.config import NetworkConfig
from lexel.generators.network import chosen_layers
from lexel.generators.sampling import filter_logits, guide, sample_index
from lexel.runtime import at_least_float32

# The share of tokens that is masked still, after the share r in (0, 1] of the steps; in training r is uniform. The
# first argument is `math` for a number and `torch` for a tensor.
SCHEDULES: dict[str, Callable[[Any, Any], Any]] = {
    "arccos": lambda of, r: of.acos(r) / (math.pi / 2),
    "cosine": lambda of, r: of.cos(r * math.pi / 2),
    "linear": lambda of, r: 1 - r,
    "square": lambda of, r: 1 - r**2,
}
Schedule = Literal["arccos", "cosine", "linear", "square"]
BOUND_PASSES = 8  # shares of masked tokens at which `nll` looks


class MaskedConfig(NetworkConfig):
    """The shape of a bidirectional transformer and what it learns from.

    `network` is of `bidirectional.NETWORKS`. `hidden` is the width of the feed-forward layers. The decoder's options,
    `dropped` and `norm_eps` belong to "mage". `schedule` draws the share of masked tokens in training; with "mage" it
    is normal around 0.55 with deviation 0.25, cut to [dropped, 1], and the share `dropped` of the tokens is kept from
    the encoder. Tokens that are not masked are predicted too, with `unmasked_weight`.
    """

    kind: Literal["masked"] = "masked"
    network: Literal["bert", "uvit", "mage"] = "bert"
    width: int = Field(default=768, ge=4)
    layers: int = Field(default=24, ge=1)
    heads: int = Field(default=16, ge=1)
    hidden: int = Field(default=3072, ge=1)
    decoder_width: int = Field(default=512, ge=4)
    decoder_layers: int = Field(default=8, ge=1)
    decoder_heads: int = Field(default=16, ge=1)
    decoder_hidden: int | None = Field(default=None, ge=1)  # 4 * decoder_width if not given
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    schedule: Schedule = "arccos"
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    unmasked_weight: float = Field(default=0.1, ge=0)
    dropped: float = Field(default=0.5, ge=0, lt=1)  # the share that "mage" drops, at least so many are masked
    norm_eps: float = Field(default=1e-6, gt=0)  # added to the variance in the norms of "mage"

    @model_validator(mode="after")
    def _consistent(self) -> "MaskedConfig":
        if self.width % self.heads:
            raise UsageError(f"heads must divide width, got {self.heads} and {self.width}")
        if self.network == "uvit" and self.layers % 2:
            raise UsageError(
                f"a uvit has as many blocks before its middle as after; layers must be even: {self.layers}"
            )
        if self.network == "mage":
            idle = ["schedule", "unmasked_weight"]
            if self.decoder_width % self.decoder_heads:
                raise UsageError(f"decoder_heads must divide decoder_width: {self.decoder_heads}, {self.decoder_width}")
        else:
            idle = ["decoder_width", "decoder_layers", "decoder_heads", "decoder_hidden", "dropped", "norm_eps"]
        for name in self.changed(idle):
            raise UsageError(f"{name} reaches nothing with network = {self.network!r}; leave it out")
        return self


class MaskedOptions(Config):
    """Sampling options of a masked generator.

    `steps` predict all tokens anew; `schedule` says how many stay masked after each. With `order = "maskgit"` a token
    is drawn at `temperature`, and how sure the model is of it is its log-probability plus Gumbel noise of
    `choice_temperature`, which falls to 0 over the steps. With "titok" the same falling temperature draws the token
    too, after `temperature` has divided the logits, and the measure is the token's logit; `annealing` also divides the
    logits by a number that falls from 1.3 to 0.5.

    Published: TiTok "titok" with annealing, L-32 and B-64 in 8 steps with choice_temperature 9.5 and 11, S-128 in 64
    steps with 2.8; MAGE "maskgit", "cosine", 20 steps, choice_temperature 6.
    """

    steps: int = Field(default=8, ge=1)
    schedule: Schedule = "arccos"
    order: Literal["maskgit", "titok"] = "maskgit"
    choice_temperature: Annotated[float, Field(ge=0, le=1e6)] = 4.5
    annealing: bool = False


class Draws(Protocol):
    """The random numbers of a sampler."""

    def tokens(self, step: int, logits: Tensor, temperature: float, filters: dict[str, Any]) -> Tensor:
        """Tokens (B, T) drawn from logits (B, T, K) at a temperature above 0."""

    def gumbel(self, step: int) -> Tensor:
        """Gumbel noise (B, T) for the order."""


class ImageDraws:
    """Random numbers of each image's own stream: block k of 2 T numbers for step k."""

    def __init__(self, batch: SampleBatch) -> None:
        self.batch, self.count = batch, batch.tokens.shape[1]

    def tokens(self, step: int, logits: Tensor, temperature: float, filters: dict[str, Any]) -> Tensor:
        uniforms = self.batch.uniforms(step, 2 * self.count)[:, : self.count]
        rows = filter_logits(logits.flatten(0, 1).to(uniforms.device), **{**filters, "temperature": temperature})
        return sample_index(rows, uniforms.flatten()).view(logits.shape[:2]).to(logits.device)

    def gumbel(self, step: int) -> Tensor:
        uniforms = self.batch.uniforms(step, 2 * self.count)[:, self.count :]
        return -torch.log(-torch.log(uniforms.clamp(min=1e-20)).clamp(min=1e-20))


class Masked(Generator):
    """p(masked tokens | the others, condition), and images that are filled in step by step.

    Args:
        config: of a `MaskedConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = MaskedConfig
    SampleOptions = MaskedOptions
    settings: MaskedConfig
    transformer: Bidirectional

    @classmethod
    def build(cls, config: MaskedConfig) -> nn.Module:
        return NETWORKS[config.network](config)

    @property
    def mask(self) -> int:
        """The number that stands for a masked token inside: the codebook's size."""
        return self.settings.codebook_size

    def layers(self) -> list[nn.Module]:
        more = ("out_blocks", "decoder_blocks")
        return [*self.transformer.blocks, *(block for name in more for block in getattr(self.transformer, name, []))]

    # ------------------------------------------------------------------------------------------ learning

    def forward(self, tokens: Tensor, condition: Tensor) -> Predicted:
        """Logits ((B, T, K),) of every token given those that are known; -1 stands where a token is not.

        Args:
            tokens: int64 (B, *grid) or (B, T) in [-1, codebook_size).
            condition: what `condition.check` makes.
        """
        flat = self.flat(tokens)
        return Predicted((self.transformer(flat.masked_fill(flat == FREE, self.mask), condition),), None)

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        layers = chosen_layers(layers, len(self.transformer.blocks), self.transformer.best_layers)
        return self.transformer.hidden(self.flat(tokens), condition, layers)

    def losses(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """`masked_nll`: the smoothed cross-entropy of masked tokens, and of the others at `unmasked_weight`."""
        flat = self.flat(tokens)
        noise = torch.rand(flat.shape, device=flat.device)
        if self.settings.network == "mage":
            return self.mage_losses(flat, condition, self.mage_rates(len(flat), flat.device), noise)
        return self.masked_losses(flat, condition, torch.rand(len(flat), device=flat.device), noise.argsort(1))

    def masked_losses(self, flat: Tensor, condition: Tensor, places: Tensor, ranks: Tensor) -> dict[str, Tensor]:
        """`losses` with its random numbers given.

        Args:
            flat: int64 (B, T).
            condition: (B, ...).
            places: (B,) in [0, 1), where in the schedule each image is.
            ranks: a permutation of the positions in each row (B, T); the lowest are masked.
        """
        count = flat.shape[1]
        shares = SCHEDULES[self.settings.schedule](torch, places).clamp(1e-6, 1)
        masked = ranks < (count * shares).round().clamp(min=1)[:, None]
        logits = self.transformer(flat.masked_fill(masked, self.mask), condition)
        weights = masked.to(logits.dtype).masked_fill(~masked, self.settings.unmasked_weight)
        nll = cross_entropy(logits, flat, self.settings.label_smoothing)
        return {"masked_nll": (nll * weights).sum() / (weights.sum() + 1e-8)}

    def mage_losses(self, flat: Tensor, condition: Tensor, rates: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`losses` of MAGE with its random numbers given.

        Args:
            flat: int64 (B, T).
            condition: (B, ...).
            rates: (B,) in [dropped, 1], the share of each image that is masked.
            noise: (B, T); the share `dropped` of the tokens, those of the lowest, are dropped from the encoder.
        """
        count = flat.shape[1]
        ranks = noise.argsort(1).argsort(1)
        dropped = ranks < math.ceil(count * self.settings.dropped)
        masked = ranks < (count * rates.double()).ceil()[:, None]
        logits = self.transformer(flat.masked_fill(masked, self.mask), condition, dropped)
        nll = cross_entropy(logits, flat, self.settings.label_smoothing)
        return {"masked_nll": (nll * masked).sum() / masked.sum()}

    def mage_rates(self, count: int, device: torch.device) -> Tensor:
        """Shares of masked tokens (count,): normal around 0.55 with deviation 0.25, cut to [dropped, 1]."""
        least = self.settings.dropped
        low, high = (0.5 * (1 + math.erf((edge - 0.55) / 0.25 / math.sqrt(2))) for edge in (least, 1.0))
        places = low + (high - low) * torch.rand(count, device=device, dtype=torch.float64)
        return (0.55 + 0.25 * torch.special.ndtri(places)).clamp(least, 1).float()

    def nll(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """An upper bound of the negative log-likelihood in nats, spread over the tokens, (B, T).

        The model is read as one that fills in token after token in a random order (https://arxiv.org/abs/2110.02037):
        the bound is T times the mean, over how many tokens are masked and which, of a masked token's. It is estimated
        at `BOUND_PASSES` evenly spaced counts and fixed masks, the same for every image, so that it does not depend on
        the batch.
        """
        flat = self.flat(tokens)
        count = flat.shape[1]
        total = torch.zeros(flat.shape, device=flat.device)
        generator = torch.Generator().manual_seed(0)
        for number in range(BOUND_PASSES):
            masked_count = max(1, round(count * (number + 0.5) / BOUND_PASSES))
            masked = (torch.randperm(count, generator=generator) < masked_count).to(flat.device).expand_as(flat)
            logits = self.transformer(flat.masked_fill(masked, self.mask), condition)
            total = total + torch.where(masked, cross_entropy(logits, flat), 0.0) * (count / masked_count)
        return total / BOUND_PASSES

    # ------------------------------------------------------------------------------------------ sampling

    def decisions(self, options: MaskedOptions) -> int:
        return options.steps

    def bytes_per_image(self, options: MaskedOptions, dtype: torch.dtype | None, guided: bool) -> int:
        config = self.settings
        rows = (2 if guided else 1) * config.tokens
        return 4 * rows * (6 * config.codebook_size + 3 * config.hidden + 12 * config.width)

    def _sample(self, batch: SampleBatch) -> Tensor:
        return self.fill(batch, ImageDraws(batch))

    def fill(self, batch: SampleBatch, draws: Draws) -> Tensor:
        """Fills in the tokens of a batch that are FREE; `draws` gives the random numbers."""
        options: MaskedOptions = batch.options
        tokens = batch.tokens.masked_fill(batch.tokens == FREE, self.mask)
        unknown = (tokens == self.mask).sum(1)  # (B,)
        for step in range(options.steps):
            batch.report(step / options.steps)
            done = (step + 1) / options.steps
            masked = tokens == self.mask
            logits = self._guided(batch, tokens, step) / batch.filters[0]["temperature"]
            fading = options.choice_temperature * (1 - done)
            if options.annealing:
                logits = logits / (0.5 + 0.8 * (1 - done))
            temperature = fading if options.order == "titok" else 1.0
            found = draws.tokens(step, logits, temperature, batch.filters[0]) if temperature else logits.argmax(-1)
            if done == 1:
                return torch.where(masked, found, tokens)
            measure = logits if options.order == "titok" else logits.log_softmax(-1)
            sure = measure.gather(-1, found[..., None])[..., 0].double()
            sure = (sure + fading * draws.gumbel(step).to(sure)).masked_fill(~masked, math.inf)
            tokens = torch.where(masked, found, tokens)
            # At least one token is kept and at least one stays masked, until the last step keeps them all.
            share = SCHEDULES[options.schedule](math, done)
            left = (unknown * share).floor().minimum(masked.sum(1) - 1).clamp(min=1)
            ranks = sure.argsort(dim=1, stable=True).argsort(1)
            tokens = tokens.masked_fill((ranks < left[:, None]) & masked, self.mask)
            batch.tokens.copy_(tokens.masked_fill(tokens == self.mask, FREE))  # for who watches
        return tokens

    def _guided(self, batch: SampleBatch, tokens: Tensor, step: int) -> Tensor:
        """Logits (B, T, K) at a step, in at least float32; the null condition's run only where guidance is on."""
        scale = batch.scales[0][step]
        null = batch.null if scale != 1 else None
        condition = batch.condition if null is None else torch.cat([batch.condition, null])
        with torch.autocast(tokens.device.type, batch.dtype, enabled=batch.dtype in (torch.bfloat16, torch.float16)):
            logits = cast(Tensor, self.transformer(tokens if null is None else tokens.repeat(2, 1), condition))
        logits = at_least_float32(logits)
        count = len(batch.tokens)
        return logits if null is None else guide(logits[:count], logits[count:], scale)
