"""Heads: how tokens enter a next-token transformer and how they are predicted, at once or as two sub-tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lexel.generators.next_token.blocks import Block

if TYPE_CHECKING:
    from lexel.generators.next_token.config import NextTokenConfig
    from lexel.generators.next_token.network import Transformer


class Head(Protocol):
    """Adds its layers to a network, under the names that published files translate to, and runs them."""

    vocabularies: tuple[int, ...]  # sizes of the sub-vocabularies, in the order in which they are predicted

    def add_inputs(self, network: "Transformer") -> None:
        """Adds the embeddings of tokens."""

    def add_outputs(self, network: "Transformer") -> None:
        """Adds what predicts tokens, with output layers of zeros once initialised."""

    def embeddings(self, network: "Transformer") -> list[nn.Embedding]:
        """One for each sub-vocabulary; a token's vector is their sum."""

    def blocks(self, network: "Transformer") -> list[Block]:
        """Blocks over the sub-tokens of one token, before the outputs."""

    def outputs(self, network: "Transformer") -> list[nn.Linear]:
        """One for each sub-vocabulary."""

    def inputs(self, network: "Transformer", indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vectors (B, T - 1, C) of all tokens but the last of indices (B, T), and what `predict` needs of them."""

    def predict(
        self, network: "Transformer", hidden: Tensor, first: Tensor | None, finish: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits (B, T, V) of each sub-vocabulary after hidden states (B, T, C); `finish` is the last norm."""


class PlainHead:
    """One linear layer over the whole vocabulary."""

    def __init__(self, config: "NextTokenConfig") -> None:
        self.vocabularies = config.vocabularies

    def add_inputs(self, network: "Transformer") -> None:
        network.tokens = nn.Embedding(self.vocabularies[0], network.config.width)

    def add_outputs(self, network: "Transformer") -> None:
        network.head = nn.Linear(network.config.width, self.vocabularies[0], bias=False)

    def embeddings(self, network: "Transformer") -> list[nn.Embedding]:
        return [network.get_submodule("tokens")]  # type: ignore[list-item]

    def blocks(self, network: "Transformer") -> list[Block]:
        return []

    def outputs(self, network: "Transformer") -> list[nn.Linear]:
        return [network.get_submodule("head")]  # type: ignore[list-item]

    def inputs(self, network: "Transformer", indices: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.embeddings(network)[0](indices[:, :-1]), None

    def predict(
        self, network: "Transformer", hidden: Tensor, first: Tensor | None, finish: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        return (self.outputs(network)[0](finish(hidden)),)


class FactorisedHead:
    """Two sub-tokens, the second given the first, by a second transformer over the pair (Open-MAGVIT2)."""

    def __init__(self, config: "NextTokenConfig") -> None:
        self.vocabularies = config.vocabularies
        self.layers = config.pair_layers

    def add_inputs(self, network: "Transformer") -> None:
        network.tokens = nn.ModuleList(nn.Embedding(size, network.config.width) for size in self.vocabularies)

    def add_outputs(self, network: "Transformer") -> None:
        width, heads, dropout = network.config.width, network.config.heads, network.config.dropout
        network.pair_blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(self.layers))
        network.heads = nn.ModuleList(nn.Linear(width, size, bias=False) for size in self.vocabularies)

    def embeddings(self, network: "Transformer") -> list[nn.Embedding]:
        return list(network.get_submodule("tokens").children())  # type: ignore[arg-type]

    def blocks(self, network: "Transformer") -> list[Block]:
        return list(network.get_submodule("pair_blocks").children())  # type: ignore[arg-type]

    def outputs(self, network: "Transformer") -> list[nn.Linear]:
        return list(network.get_submodule("heads").children())  # type: ignore[arg-type]

    def inputs(self, network: "Transformer", indices: Tensor) -> tuple[Tensor, Tensor | None]:
        first, second = (
            embed(part)
            for embed, part in zip(self.embeddings(network), split_tokens(indices, self.vocabularies), strict=True)
        )
        return (first + second)[:, :-1], first

    def predict(
        self, network: "Transformer", hidden: Tensor, first: Tensor | None, finish: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        assert first is not None
        pairs = torch.stack([hidden, first], 2).flatten(0, 1)  # (B * T, 2, C)
        rope = network.pair_positions(hidden)
        for block in self.blocks(network):
            pairs = network.run(block, pairs, rope)
        pairs = finish(pairs).unflatten(0, hidden.shape[:2])
        return tuple(output(pairs[:, :, number]) for number, output in enumerate(self.outputs(network)))


def split_tokens(indices: Tensor, vocabularies: tuple[int, ...]) -> list[Tensor]:
    """The sub-tokens of tokens of any shape, the low digit first; a plain vocabulary has one."""
    if len(vocabularies) == 1:
        return [indices]
    return [indices % vocabularies[0], indices // vocabularies[0]]


def join_tokens(parts: list[Tensor], vocabularies: tuple[int, ...]) -> Tensor:
    """The tokens whose sub-tokens are `parts`."""
    return parts[0] if len(parts) == 1 else parts[0] + vocabularies[0] * parts[1]
