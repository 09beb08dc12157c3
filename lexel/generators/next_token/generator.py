"""The next-token family: an autoregressive transformer over the tokens of an image, in raster order."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, InstanceOf, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError
from lexel.generators.base import Generator, Predicted, cross_entropy
from lexel.generators.batch import SampleBatch
from lexel.generators.config import GeneratorConfig
from lexel.generators.network import chosen_layers
from lexel.generators.next_token.config import NextTokenConfig
from lexel.generators.next_token.decoding import Decoder, weights_version
from lexel.generators.next_token.fused import CacheWrite
from lexel.generators.next_token.heads import split_tokens
from lexel.generators.next_token.network import Transformer
from lexel.generators.next_token.speculative import DRAWS, Draft, speculative
from lexel.generators.next_token.walk import Walk, raster, wavefront


class NextTokenOptions(Config):
    """Sampling options of a next-token generator.

    `window` decodes rows in a wavefront: a row starts when the row above is this many tokens ahead, so an image of h
    rows takes w + (h - 1) window steps, not h w. Tokens near a row's end then miss some of what stands above to the
    right; a window of w or more is exact. None is off. `implementation` is of `decoding.IMPLEMENTATIONS`; `likelihood`
    tells what `int8` costs. `draft` proposes several tokens that the generator tests in one pass: see `Draft`.
    """

    window: int | None = Field(default=None, ge=1)
    implementation: str = "auto"
    draft: InstanceOf[Draft] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "NextTokenOptions":
        if self.window is not None and self.draft is not None:
            raise UsageError("window and draft are two ways to decode; leave one of them out")
        return self


class NextToken(Generator):
    """p(token | tokens before it, condition): IBQ's, LlamaGen's and Open-MAGVIT2's generators.

    Args:
        config: of a `NextTokenConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = NextTokenConfig
    SampleOptions = NextTokenOptions
    settings: NextTokenConfig
    transformer: Transformer

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self._decoders: dict[Any, Decoder] = {}

    @classmethod
    def build(cls, config: NextTokenConfig) -> nn.Module:
        return Transformer(config)

    def train(self, mode: bool = True) -> Self:
        """Forgets the copies of the weights that sampling made: a fused optimizer moves weights and does not say so."""
        if mode:
            self._decoders.clear()
        return super().train(mode)

    @property
    def sub_tokens(self) -> int:
        return len(self.transformer.vocabularies)

    def layers(self) -> list[nn.Module]:
        return [*self.transformer.blocks, *self.transformer.prediction.blocks(self.transformer)]

    # ------------------------------------------------------------------------------------------ likelihood

    def forward(self, indices: Tensor, condition: Tensor) -> Predicted:
        """Logits and negative log-likelihood of every token, given the condition and the tokens before it.

        Args:
            indices: int64 (B, *grid), or (B, T) in raster order, in [0, codebook_size).
            condition: what `condition.check` makes: int64 (B,) in [0, classes] for classes; number `classes` is the
                null class. In training it is dropped to the null condition at random.

        Raises:
            UsageError: a shape does not fit. Values are not checked: that would wait for the device.
        """
        tokens = self.flat(indices)
        logits = self.transformer(tokens, condition.to(tokens.device))
        parts = split_tokens(tokens, self.transformer.vocabularies)
        nll = torch.stack([cross_entropy(*each) for each in zip(logits, parts, strict=True)]).sum(0)
        return Predicted(logits, nll)

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        layers = chosen_layers(layers, len(self.transformer.blocks))
        return self.transformer.states(self.flat(tokens), condition.to(tokens.device), layers)[0]

    @torch.no_grad()
    def likelihood(
        self,
        indices: Tensor,
        condition: Any,
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Negative log-likelihoods in nats, (B, T), as the way to decode that `sample` would take sees them.

        Beside `nll` this tells what a fast path costs: `likelihood(..., implementation="int8") - nll(...)`.

        Args:
            indices: int64 (B, *grid), or (B, T) in raster order.
            condition, implementation, dtype: as for `sample`.
        """
        tokens = self.check_tokens(indices).to(self.device)
        prepared = self.condition.check(condition)
        if len(prepared) != len(tokens):
            raise UsageError(f"{len(prepared)} conditions for {len(tokens)} images")
        decoder, count = self.decoder(implementation, dtype), tokens.shape[1]
        cache = decoder.start(prepared, count)
        positions = torch.arange(count, device=tokens.device)
        seen = positions <= positions[:, None]
        inputs = decoder.embed(cache, tokens, 0, count)
        hidden = decoder.run(cache, inputs, positions, CacheWrite(positions, count, seen))
        parts = split_tokens(tokens, self.transformer.vocabularies)
        columns = []
        for position in range(count):
            nll = torch.zeros((), device=tokens.device)
            for number, part in enumerate(parts):
                first = parts[0][:, position] if number else None
                logits = decoder.logits(cache, hidden[:, position], first)
                nll = nll + F.cross_entropy(logits, part[:, position], reduction="none")
            columns.append(nll)
        return torch.stack(columns, 1)

    @torch.no_grad()
    def extra_bits(
        self,
        indices: Tensor,
        condition: Any,
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> float:
        """Bits a token that a decoding implementation adds; arguments as for `likelihood`."""
        exact = self.likelihood(indices, condition, "plain")
        fast = self.likelihood(indices, condition, implementation, dtype)
        return float((fast.double() - exact.double()).mean()) / math.log(2)

    # ------------------------------------------------------------------------------------------ sampling

    def _sample(self, batch: SampleBatch) -> Tensor:
        decoder = self.decoder(batch.options.implementation, batch.dtype)
        shape, count = (len(batch.tokens), -1, self.sub_tokens), batch.tokens.shape[1] * self.sub_tokens
        window, draft = batch.options.window, batch.options.draft
        if draft is not None:
            random = batch.uniforms(0, count * DRAWS).view(*shape, DRAWS)
            return speculative(Walk(decoder, batch, random), draft.decoder(self, decoder, batch.dtype), draft)
        walk = Walk(decoder, batch, batch.uniforms(0, count).view(shape))
        return raster(walk) if window is None else wavefront(walk, window)

    def bytes_per_image(self, options: NextTokenOptions, dtype: torch.dtype | None, guided: bool) -> int:
        if options.window is not None and len(self.grid) != 2:
            raise UsageError(f"window needs rows and columns of tokens; the grid is {self.grid}")
        rows = 2 if guided else 1
        decoder, tokens, draft = self.decoder(options.implementation, dtype), self.settings.tokens, options.draft
        if draft is None:
            return rows * decoder.bytes_per_row(tokens)
        both = (decoder, draft.decoder(self, decoder, dtype))
        laws = 2 * draft.tokens * 32 * max(self.settings.vocabularies)  # of the proposals, in float64, and their copies
        return rows * sum(each.bytes_per_row(tokens + draft.tokens) for each in both) + laws

    def held_bytes(self) -> int:
        return sum(decoder.kept_bytes for decoder in self._decoders.values())

    def decoder(self, implementation: str, dtype: torch.dtype | None, beside: Decoder | None = None) -> Decoder:
        """The decoder for the weights as they are now; the last one is kept, and `beside`, which is needed too."""
        key = (implementation, dtype, weights_version(self.transformer))
        if key not in self._decoders:  # a decoder holds a copy of the weights: keep no more than needed
            for other in [other for other, held in self._decoders.items() if held is not beside]:
                del self._decoders[other]
            self._decoders[key] = Decoder(self.transformer, implementation, dtype)
        return self._decoders[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoders": {}}  # packed weights cannot be copied, and are made again when needed
