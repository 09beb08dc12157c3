"""Random-order generators: next-token prediction over permuted tokens, annealed to raster order (RAR).

Published as https://arxiv.org/abs/2411.00776. Each position is told which place comes next (a second table of
positions, added one step earlier), so that one network learns every order; towards the end of training the orders
become raster order, in which images are sampled.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError
from lexel.generators.base import FREE, Generator, Predicted, cross_entropy
from lexel.generators.batch import SampleBatch
from lexel.generators.bidirectional import FeedForward
from lexel.generators.config import NetworkConfig
from lexel.generators.network import ConditionedNetwork, chosen_layers
from lexel.runtime import at_least_float32

EPSILON = 1e-6  # of every norm


class RandomOrderConfig(NetworkConfig):
    """The shape of the transformer and how long it learns in random orders.

    `hidden` is the width of the feed-forward layers. Every image is permuted until the share `anneal_from` of training,
    none from `anneal_to` on, and fewer and fewer in between.
    """

    kind: Literal["random_order"] = "random_order"
    width: int = Field(default=768, ge=4)
    layers: int = Field(default=24, ge=1)
    heads: int = Field(default=16, ge=1)
    hidden: int = Field(default=3072, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    anneal_from: float = Field(default=0.5, ge=0, le=1)
    anneal_to: float = Field(default=0.75, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> "RandomOrderConfig":
        if self.width % self.heads:
            raise UsageError(f"heads must divide width, got {self.heads} and {self.width}")
        if self.anneal_to < self.anneal_from:
            raise UsageError(f"anneal_to = {self.anneal_to} lies before anneal_from = {self.anneal_from}")
        return self


class RandomOrderOptions(Config):
    """Sampling options of a random-order generator.

    `order` is "raster", or "given_first": known tokens come before those to be sampled, so that every sampled token
    sees all of them. That needs a model that has learned random orders until its end.
    """

    order: Literal["raster", "given_first"] = "raster"


class Block(nn.Module):
    """Causal attention with normed queries and keys, then a feed-forward layer; both modulated at every position."""

    def __init__(self, config: RandomOrderConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.heads
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(head_dim, EPSILON)
        self.key_norm = nn.LayerNorm(head_dim, EPSILON)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.feed_forward = FeedForward(width, config.hidden, config.dropout)
        self.modulation = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, vector: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, T, C) and what modulates it, (B, T, C); keys and values are added to a `past` of (B, heads, slots, D).

        A past has room for exactly the positions before and these; without one the positions are a whole sequence.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(vector)).chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # (B, heads, T, D)
        q, k = self.query_norm(q), self.key_norm(k)
        dropout = self.attention_dropout if self.training else 0.0
        if past is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            count = k.shape[2]
            keys, values = past
            keys[:, :, -count:], values[:, :, -count:] = k, v
            mask = torch.ones(count, keys.shape[2], dtype=torch.bool, device=x.device).tril(keys.shape[2] - count)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + gate1 * self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * cast(Tensor, self.feed_forward(y))


class RandomOrderTransformer(ConditionedNetwork):
    """Logits of tokens in any order: [start, condition, tokens], each position told where the next token is.

    Attributes:
        prefix: positions before the tokens.
    """

    config: RandomOrderConfig

    def __init__(self, config: RandomOrderConfig) -> None:
        super().__init__(config, config.width)
        self.prefix = 1 + self.condition.length
        length = self.prefix + config.tokens
        self.tokens = nn.Embedding(config.codebook_size, config.width)
        self.first = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.zeros(length, config.width))
        self.targets = nn.Parameter(torch.zeros(config.tokens, config.width))  # the place of the token to come
        self.steps = nn.Parameter(torch.zeros(length, config.width))  # how many positions came before
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, EPSILON, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)  # of the last norm
        self.head = nn.Linear(config.width, config.codebook_size)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Every matrix and table from a normal distribution of 0.02; biases and modulations 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.first, self.positions, self.targets, self.steps):
            nn.init.trunc_normal_(table, std=0.02)
        for modulation in [self.modulation, *(cast(Block, block).modulation for block in self.blocks)]:
            nn.init.zeros_(modulation.weight)

    def embed(self, tokens: Tensor, rows: Tensor, orders: Tensor) -> Tensor:
        """Inputs (B, prefix + T', C) of the first T' tokens in their order; `orders` (B, T) has places of all."""
        count = tokens.shape[1]
        first = self.first.expand(len(rows), 1, -1)
        x = torch.cat([first, rows, self.tokens(tokens)], 1)
        before, own = self.positions.split([self.prefix, orders.shape[1]])
        places = torch.cat([before.expand(len(rows), -1, -1), own[orders[:, :count]]], 1)
        following = self.targets[orders[:, : count + 1]]  # (B, T' + 1, C), fewer where nothing follows the last token
        following = F.pad(following, (0, 0, self.prefix - 1, x.shape[1] - self.prefix + 1 - following.shape[1]))
        return x + places + following

    def finish(self, x: Tensor, vector: Tensor) -> Tensor:
        """Logits after hidden states."""
        scale, shift = self.modulation(F.silu(vector)).chunk(2, -1)
        return cast(Tensor, self.head(self.norm(x) * (1 + scale) + shift))

    def forward(self, tokens: Tensor, condition: Tensor, orders: Tensor) -> Tensor:
        """Logits (B, T + 1, K): of each token in its order given those before, and one more after the last.

        Args:
            tokens: int64 (B, T), in the order of `orders`.
            condition: (B, ...), checked.
            orders: int64 (B, T), the place of each of them.
        """
        return self.finish(*self.states(tokens, condition, orders, len(self.blocks)))

    def states(self, tokens: Tensor, condition: Tensor, orders: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """States (B, T + 1, C) after so many blocks, where each token is predicted, and what modulates them there.

        A state has seen the condition and the tokens before its own; the last has seen all.
        """
        rows = self.condition(self.condition.drop(condition))
        x = self.embed(tokens, rows, orders)
        vector = self.condition.pooled(rows) + self.steps[: x.shape[1]]
        for block in self.blocks[:layers]:
            x = self.run(block, x, vector)
        start = self.prefix - 1
        return x[:, start:], vector[:, start:]


class RandomOrder(Generator):
    """p(token | the tokens before it in an order, condition).

    Args:
        config: of a `RandomOrderConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = RandomOrderConfig
    SampleOptions = RandomOrderOptions
    settings: RandomOrderConfig
    transformer: RandomOrderTransformer
    permuted = 1.0  # the share of images that training permutes; `anneal` sets it

    @classmethod
    def build(cls, config: RandomOrderConfig) -> nn.Module:
        return RandomOrderTransformer(config)

    def anneal(self, progress: float) -> None:
        config = self.settings
        fall = config.anneal_to - config.anneal_from
        left = (config.anneal_to - progress) / fall if fall else float(progress < config.anneal_to)
        self.permuted = min(1.0, max(0.0, left))

    # ------------------------------------------------------------------------------------------ learning

    def forward(self, tokens: Tensor, condition: Tensor) -> Predicted:
        """Logits and negative log-likelihood of every token in raster order.

        Args:
            tokens: int64 (B, *grid) or (B, T), in [0, codebook_size).
            condition: what `condition.check` makes.
        """
        flat = self.flat(tokens)
        logits = self.transformer(flat, condition, self._raster(flat))[:, :-1]
        return Predicted((logits,), cross_entropy(logits, flat))

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        layers, flat = chosen_layers(layers, len(self.transformer.blocks)), self.flat(tokens)
        return self.transformer.states(flat, condition.to(flat.device), self._raster(flat), layers)[0][:, :-1]

    def losses(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """`nll`: the mean negative log-likelihood of a token, in nats, in an order of its own for each image."""
        flat = self.flat(tokens)
        random = torch.rand(flat.shape, device=flat.device).argsort(1)
        permuted = torch.rand(len(flat), 1, device=flat.device) < self.permuted
        return self.ordered_losses(flat, condition, torch.where(permuted, random, self._raster(flat)))

    def ordered_losses(self, flat: Tensor, condition: Tensor, orders: Tensor) -> dict[str, Tensor]:
        """`losses` with the orders given: int64 (B, T), the places of the tokens one after the other."""
        labels = flat.gather(1, orders)
        return {"nll": cross_entropy(self.transformer(labels, condition, orders)[:, :-1], labels).mean()}

    def _raster(self, flat: Tensor) -> Tensor:
        return torch.arange(flat.shape[1], device=flat.device).expand_as(flat)

    # ------------------------------------------------------------------------------------------ sampling

    def bytes_per_image(self, options: RandomOrderOptions, dtype: torch.dtype | None, guided: bool) -> int:
        config, rows = self.settings, 2 if guided else 1
        cache = 2 * config.layers * (self.transformer.prefix + config.tokens) * config.width
        return 4 * rows * (cache + 8 * config.codebook_size)

    def _sample(self, batch: SampleBatch) -> Tensor:
        """Token after token; what has run stays in the cache."""
        network, tokens = self.transformer, batch.tokens
        length, free = tokens.shape[1], tokens == FREE
        orders = self._raster(tokens)
        if batch.options.order == "given_first":
            orders = free.long().argsort(dim=1, stable=True)
        random = batch.uniforms(0, length)
        halves = len(batch.conditions)
        rows = network.condition(torch.cat(batch.conditions))
        pooled = network.condition.pooled(rows)
        shape = (len(rows), network.config.heads, network.prefix + length, network.config.width // network.config.heads)
        caches = [(rows.new_zeros(shape), rows.new_zeros(shape)) for _ in network.blocks]
        for place in range(length):
            batch.report(place / length)
            begin, end = (0, network.prefix) if place == 0 else (network.prefix + place - 1, network.prefix + place)
            known = tokens.gather(1, orders[:, :place]).repeat(halves, 1)
            x = network.embed(known, rows, orders.repeat(halves, 1))[:, begin:end]
            vector = pooled + network.steps[begin:end]
            for block, (keys, values) in zip(network.blocks, caches, strict=True):
                x = block(x, vector, (keys[:, :, :end], values[:, :, :end]))
            logits = network.finish(x[:, -1:], vector[:, -1:])[:, 0]
            logits = at_least_float32(logits)
            here = orders[:, place : place + 1]
            found = batch.draw(logits, place, random.gather(1, here.to(random.device))[:, 0])
            chosen = torch.where(free.gather(1, here), found[:, None], tokens.gather(1, here))
            tokens.scatter_(1, here, chosen)
        return tokens
