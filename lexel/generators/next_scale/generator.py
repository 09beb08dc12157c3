"""Tokens scale by scale, coarse to fine (VAR, https://arxiv.org/abs/2404.02905)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.generators.base import FREE, Generator, Predicted, cross_entropy
from lexel.generators.batch import SampleBatch
from lexel.generators.config import NetworkConfig
from lexel.generators.network import ConditionedNetwork, chosen_layers
from lexel.generators.next_scale.network import Cache, ScaleTransformer
from lexel.quantizers import Multiscale
from lexel.token_spec import TokenSpec

PUBLISHED = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]  # sides of the scales at 256 px


class NextScaleConfig(NetworkConfig):
    """The options of a transformer over scales.

    `scales` are the sides of the grids, from small to large, as the tokenizer's multiscale quantizer has them.
    `normalised` makes queries and keys unit vectors with a learned temperature; `shared_modulation` lets one layer
    modulate all blocks, as the 512-pixel model does. Only square grids.
    """

    kind: Literal["next_scale"] = "next_scale"
    codebook_size: int = Field(default=4096, ge=2)
    codebook_dim: int = Field(default=32, ge=1)
    scales: list[int] = Field(default=PUBLISHED, min_length=2)
    width: int = Field(default=1024, ge=1)
    layers: int = Field(default=16, ge=1)
    heads: int = Field(default=16, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    normalised: bool = True
    shared_modulation: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)  # added to the variance in the norms

    @property
    def token_spec(self) -> TokenSpec:
        """The layout of tokens: a square grid for every scale."""
        return TokenSpec(tuple((side, side) for side in self.scales), self.codebook_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image's tokens, all scales in a row: (T,)."""
        return self.token_spec.shape

    def check_fits(self, spec: TokenSpec, classes: Sequence[str] | None, source: str) -> None:
        """Refuses tokens that the network is not made for, and says which options would fit."""
        sides = [grid[0] for grid in spec.grids]
        if spec.books is not None or any(len(grid) != 2 or grid[0] != grid[1] for grid in spec.grids):
            raise UsageError(f"{source} has grids {spec.grids}; a next_scale generator needs square ones")
        found: dict[str, Any] = {"scales": sides, "codebook_size": spec.codebook_size}
        if self.condition is None:
            found["classes"] = 1 if classes is None else len(classes)
        self.refuse_other(found, source)

    @model_validator(mode="after")
    def _consistent(self) -> "NextScaleConfig":
        if self.scales != sorted(set(self.scales)) or self.scales[0] < 1:
            raise UsageError(f"scales must be rising sides such as [1, 2, 4, 8], got {self.scales}")
        if self.width % self.heads:
            raise UsageError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        return self


class NextScaleNetwork(ConditionedNetwork):
    """The transformer and its condition."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__(config, config.width)
        self.network = ScaleTransformer(config)
        self.network.initialise()
        if isinstance(self.condition, nn.Embedding):
            nn.init.trunc_normal_(self.condition.weight, std=math.sqrt(1 / config.width / 3))

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, for sharding."""
        return self.network.blocks

    def forward(self, vectors: Tensor, condition: Tensor) -> Tensor:
        """Logits (B, T, K) from the previews of coarser scales (B, T - T1, D) and a checked condition."""
        return cast(Tensor, self.network(vectors, self.pooled(condition), self.run))


class NextScale(Generator):
    """p(tokens of a scale | tokens of all coarser scales, condition); the tokens of a scale are drawn together.

    Args:
        config: of a `NextScaleConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = NextScaleConfig
    settings: NextScaleConfig
    transformer: NextScaleNetwork

    @classmethod
    def build(cls, config: NextScaleConfig) -> nn.Module:
        return NextScaleNetwork(config)

    @property
    def needs_tokenizer(self) -> bool:
        return True

    def forward(self, tokens: Tensor, condition: Tensor) -> Predicted:
        """Logits and negative log-likelihood of every token.

        Args:
            tokens: int64 (B, T), coarse to fine.
            condition: as `condition.check` makes it.
        """
        tokens = self.flat(tokens)
        logits = self.transformer(self._inputs(tokens), condition.to(tokens.device))
        return Predicted((logits,), cross_entropy(logits, tokens))

    @torch.no_grad()
    def _inputs(self, flat: Tensor) -> Tensor:
        """The network's inputs for tokens (B, T): previews (B, T - T1, D) of the scales but the first."""
        return self.multiscale().next_inputs(flat, self._grid).to(self.dtype)

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        network, flat = self.transformer.network, self.flat(tokens)
        layers = chosen_layers(layers, len(network.blocks))
        vector = self.transformer.pooled(condition.to(flat.device))
        x = network.embed(self._inputs(flat), vector, 0, flat.shape[1])
        return network.states(x, vector, network.mask(x.device), layers=layers)[0]

    def multiscale(self) -> Multiscale:
        """The tokenizer's quantizer, whose sums the network sees.

        Raises:
            UsageError: there is no tokenizer, or it has another quantizer.
        """
        quantizer = self.quantizer()
        if not isinstance(quantizer, Multiscale):
            raise UsageError("a next_scale generator needs a tokenizer with a multiscale quantizer")
        if list(quantizer.scales) != self.settings.scales or quantizer.codebook_dim != self.settings.codebook_dim:
            raise UsageError(
                f"the tokenizer has scales {list(quantizer.scales)} and codes of length {quantizer.codebook_dim}, the "
                f"generator {self.settings.scales} and {self.settings.codebook_dim}"
            )
        return quantizer

    @property
    def _grid(self) -> tuple[int, int]:
        """The grid of latents: the last scale's."""
        return (self.settings.scales[-1], self.settings.scales[-1])

    # ------------------------------------------------------------------------------------------ sampling

    def decisions(self, options: Any) -> int:
        return len(self.settings.scales)

    def bytes_per_image(self, options: Any, dtype: torch.dtype | None, guided: bool) -> int:
        config = self.settings
        cache = 2 * config.layers * config.tokens * config.width
        last = config.scales[-1] ** 2
        return 4 * (2 if guided else 1) * (cache + last * (12 * config.width + 3 * config.codebook_size))

    def _sample(self, batch: SampleBatch) -> Tensor:
        config, network, quantizer = self.settings, self.transformer.network, self.multiscale()
        count, tokens = len(batch.tokens), batch.tokens
        uniforms = batch.uniforms(0, config.tokens)
        vector = torch.cat([self.transformer.vector(rows) for rows in batch.conditions])
        sums = torch.zeros(count, config.codebook_dim, *self._grid, device=self.device)
        sums = sums.to(torch.promote_types(quantizer.codebook.dtype, torch.float32))
        vectors, cache = sums.new_zeros(count, 0, config.codebook_dim), cast(Cache | None, None)
        first = 0
        for scale, side in enumerate(config.scales):
            end = first + side * side
            x = network.embed(vectors.to(self.dtype).repeat(len(batch.conditions), 1, 1), vector, first, side * side)
            x, cache = network.states(x, vector, None, cache)
            drawn = batch.draw(network.logits(x, vector), scale, uniforms[:, first:end])
            tokens[:, first:end] = torch.where(tokens[:, first:end] == FREE, drawn, tokens[:, first:end])
            if scale + 1 < len(config.scales):
                sums = quantizer.refine(sums, scale, tokens[:, first:end].view(count, side, side))
                vectors = quantizer.preview(sums, scale + 1).flatten(2).transpose(1, 2)
            first = end
            batch.report((scale + 1) / len(config.scales))
        return tokens
