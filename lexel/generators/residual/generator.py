"""Residual codes, position by position and depth by depth (RQ-Transformer, https://arxiv.org/abs/2203.01941)."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.conditions import CaptionWords
from lexel.errors import UsageError
from lexel.generators.base import FREE, Generator, Predicted, cross_entropy
from lexel.generators.batch import SampleBatch
from lexel.generators.config import NetworkConfig
from lexel.generators.network import ConditionedNetwork, chosen_layers
from lexel.generators.residual.network import Cache, Classifier, ResidualTransformer
from lexel.runtime import at_least_float32
from lexel.token_spec import TokenSpec


class ResidualConfig(NetworkConfig):
    """The options of a transformer over residual codes.

    `books` is the number of codes a position. Code vectors come from the tokenizer; `codebook_dim = 0` learns a table
    for every depth instead, or one for all with `shared_tables`. `cumulative` shows the depth transformer the sum of
    the codes before, otherwise the last one. `layers` and `heads` are of the transformer over positions, `depth_layers`
    and `depth_heads` (the same heads by default) of that over depths. With a condition of words, `words_weight` is the
    share of the loss that predicts the words themselves.
    """

    kind: Literal["residual"] = "residual"
    rows: int = Field(default=8, ge=1)
    columns: int = Field(default=8, ge=1)
    books: int = Field(default=4, ge=1)
    codebook_dim: int = Field(default=256, ge=0)
    width: int = Field(default=1536, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=24, ge=1)
    depth_layers: int = Field(default=4, ge=1)
    depth_heads: int | None = Field(default=None, ge=1)
    cumulative: bool = True
    shared_classifier: bool = True
    words_weight: float = Field(default=0.0, ge=0, lt=1)
    shared_tables: bool = False
    sigmoid_gelu: bool = False  # in the transformer over positions
    depth_sigmoid_gelu: bool = False  # in that over depths
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def token_spec(self) -> TokenSpec:
        """The layout of tokens: (books, rows, columns)."""
        return TokenSpec((super().shape,), self.codebook_size, self.books)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image's tokens: (books, rows, columns)."""
        return (self.books, *super().shape)

    @property
    def positions(self) -> int:
        """Positions of an image, each with a code for every depth."""
        return self.tokens // self.books

    def check_fits(self, spec: TokenSpec, classes: Sequence[str] | None, source: str) -> None:
        """Refuses tokens that the network is not made for, and says which options would fit."""
        if spec.books is None:
            raise UsageError(f"{source} has one code at a place; a residual generator needs a residual quantizer's")
        self.refuse_other({"books": spec.books}, source)
        super().check_fits(spec._replace(books=None), classes, source)

    @model_validator(mode="after")
    def _consistent(self) -> "ResidualConfig":
        heads = self.depth_heads or self.heads
        if self.width % self.heads or self.width % heads:
            raise UsageError(f"width must be a multiple of heads, got {self.width} / {self.heads} and {heads}")
        if self.shared_tables and self.codebook_dim:
            raise UsageError("shared_tables reaches nothing where codebook_dim is not 0; leave it out")
        if self.words_weight and (self.condition or {}).get("kind") != "words":
            raise UsageError('words_weight reaches nothing without condition.kind = "words"; leave it out')
        return self


class ResidualNetwork(ConditionedNetwork):
    """The two transformers and the condition."""

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__(config, config.width)
        self.network = ResidualTransformer(config, self.condition.length)
        self.network.initialise()
        if isinstance(self.condition, nn.Embedding):
            nn.init.normal_(self.condition.weight, std=0.02)
        self.words_classifier: Classifier | None = None
        if config.words_weight:
            self.words_classifier = Classifier(config.width, cast(CaptionWords, self.condition).vocabulary, None)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of both transformers, for sharding."""
        return [*self.network.body_transformer.blocks, *self.network.head_transformer.blocks]

    def forward(self, codes: Tensor, vectors: Tensor | None, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, D, K) of codes (B, T, D) given the condition and all codes before; and those of its words.

        The words' logits are (B, L - 1, vocabulary), of every word but the first; None where they are not predicted.
        """
        rows = self.condition(self.condition.drop(condition))  # (B, L, C)
        logits, outputs = self.network(codes, vectors, rows, self.run)
        return logits, None if self.words_classifier is None else self.words_classifier(outputs)


class ResidualGenerator(Generator):
    """p(code | codes of earlier positions, codes above it at its own, condition).

    Args:
        config: of a `ResidualConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = ResidualConfig
    settings: ResidualConfig
    transformer: ResidualNetwork

    @classmethod
    def build(cls, config: ResidualConfig) -> nn.Module:
        return ResidualNetwork(config)

    @property
    def needs_tokenizer(self) -> bool:
        return self.settings.codebook_dim > 0

    def forward(self, tokens: Tensor, condition: Tensor) -> Predicted:
        """Logits and negative log-likelihood of every code.

        Args:
            tokens: int64 (B, books, rows, columns).
            condition: as `condition.check` makes it.
        """
        return self._predicted(tokens, condition)[0]

    def _predicted(self, tokens: Tensor, condition: Tensor) -> tuple[Predicted, Tensor | None]:
        codes = self._codes(tokens)
        logits, words = self.transformer(codes, self._vectors(codes), condition.to(codes.device))
        logits = at_least_float32(logits).transpose(1, 2).flatten(1, 2)  # (B, D T, K)
        return Predicted((logits,), cross_entropy(logits, codes.transpose(1, 2).flatten(1))), words

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        network, codes = self.transformer.network, self._codes(tokens)
        layers = chosen_layers(layers, len(network.body_transformer.blocks))
        rows = self.transformer.condition(condition.to(codes.device))
        return network.body(codes, self._vectors(codes), rows, layers=layers)[:, -codes.shape[1] :]

    def losses(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """`nll`: the mean negative log-likelihood of a code, in nats; `words`, that of a word, each with its share."""
        predicted, words = self._predicted(tokens, condition)
        assert predicted.nll is not None
        if words is None:
            return {"nll": predicted.nll.mean()}
        share = self.settings.words_weight
        found = F.cross_entropy(words.flatten(0, 1), condition[:, 1:].flatten().to(words.device))
        return {"nll": (1 - share) * predicted.nll.mean(), "words": share * found}

    def _codes(self, tokens: Tensor) -> Tensor:
        """Tokens (B, books, *grid) position by position, int64 (B, T, D)."""
        return self.flat(tokens).view(len(tokens), self.settings.books, -1).transpose(1, 2)

    def _vectors(self, codes: Tensor) -> Tensor | None:
        """The code vectors (B, n, d, codebook_dim) of codes (B, n, d) of the first d depths."""
        if not self.settings.codebook_dim:
            return None
        table = self.quantizer().codebook.detach()  # (D, K, codebook_dim)
        if table.dim() != 3 or table.shape[0] != self.settings.books or table.shape[2] != self.settings.codebook_dim:
            raise UsageError(
                f"generator.books = {self.settings.books} and generator.codebook_dim = {self.settings.codebook_dim} do "
                f"not fit a tokenizer with codes {tuple(table.shape)}"
            )
        return table[torch.arange(codes.shape[-1], device=codes.device), codes].to(self.dtype)

    # ------------------------------------------------------------------------------------------ sampling

    def bytes_per_image(self, options: Any, dtype: torch.dtype | None, guided: bool) -> int:
        config = self.settings
        cache = 2 * config.layers * (config.positions + self.condition.length) * config.width
        return 4 * (2 if guided else 1) * (cache + 16 * config.width + 4 * config.codebook_size)

    def _sample(self, batch: SampleBatch) -> Tensor:
        config, network = self.settings, self.transformer.network
        depths, count = config.books, len(batch.tokens)
        known = batch.tokens.view(count, depths, -1)  # (B, D, T)
        codes = known.clamp_min(0)
        uniforms = batch.uniforms(0, config.tokens).view(count, -1, depths)
        rows = torch.cat([self.transformer.condition(condition) for condition in batch.conditions])
        x = rows + network.pos_emb_cond
        cache: Cache | None = None
        for position in range(config.positions):
            if position:
                before = codes[:, :, position - 1 : position].transpose(1, 2).repeat(len(batch.conditions), 1, 1)
                x = network.position_inputs(before, self._vectors(before), position - 1)
            x, cache = network.body_transformer(x, cache)
            codes[:, :, position] = self._depths(
                batch, x[:, -1], known[:, :, position], uniforms[:, position], position * depths
            )
            batch.report((position + 1) / config.positions)
        return codes.flatten(1)

    def _depths(self, batch: SampleBatch, context: Tensor, known: Tensor, uniforms: Tensor, first: int) -> Tensor:
        """The codes (B, D) of one position, from the body's output there (B or 2 B, C)."""
        network, count = self.transformer.network, len(known)
        codes = known.clamp_min(0)
        cache: Cache | None = None
        for depth in range(known.shape[1]):
            repeated = codes[:, :depth].repeat(len(context) // count, 1)
            vectors = self._vectors(repeated[:, None])
            x = network.depth_inputs(context, repeated, None if vectors is None else vectors[:, 0])[:, -1:]
            x, cache = network.head_transformer(x, cache)
            logits = network.classifier(x, depth)[:, 0]
            drawn = batch.draw(logits, first + depth, uniforms[:, depth])
            codes[:, depth] = torch.where(known[:, depth] == FREE, drawn, known[:, depth])
        return codes
