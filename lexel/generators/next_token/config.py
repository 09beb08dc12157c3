"""The options of a next-token generator."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from lexel.errors import UsageError, unknown
from lexel.generators.config import NetworkConfig

LARGEST_PLAIN_HEAD = 2**18  # from this vocabulary on, `head = "auto"` is factorised


class NextTokenConfig(NetworkConfig):
    """The shape of a transformer over the tokens of an image.

    `head` predicts a token at once ("plain") or as two sub-tokens, one after the other ("factorised"); "auto" chooses
    by the codebook's size. `pair_layers` and `factors` belong to the factorised head: the layers of its second
    transformer, and the sizes of the two sub-vocabularies, the low digit first: token = first + factors[0] * second.
    `modulated` says whether the condition scales and shifts every norm, and `gamma_init` how far open its branches
    begin; a factorised head has neither. `network = "gpt"` is VQGAN's plain GPT instead of Llama's blocks: layer norms,
    biases, learned positions, GELU; the class is its start token and nothing more, and its head is plain. An option
    that would reach nothing is refused.
    """

    kind: Literal["next_token"] = "next_token"
    network: Literal["llama", "gpt"] = "llama"
    width: int = Field(default=1024, ge=4)
    layers: int = Field(default=16, ge=1)
    heads: int = Field(default=16, ge=1)
    head: str = "auto"
    pair_layers: int = Field(default=2, ge=1)
    factors: list[int] | None = None
    dropout: float = Field(default=0.1, ge=0, lt=1)
    gamma_init: float = Field(default=1e-3, ge=0)
    modulated: bool = True

    @property
    def factorised(self) -> bool:
        """Whether tokens are predicted as two sub-tokens."""
        large = self.codebook_size >= LARGEST_PLAIN_HEAD and self.network == "llama"
        return self.head == "factorised" or (self.head == "auto" and large)

    @property
    def adaptive(self) -> bool:
        """Whether the condition modulates the norms."""
        return self.modulated and not self.factorised and self.network == "llama"

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """The sizes of the sub-vocabularies; their product is the codebook's size."""
        if not self.factorised:
            return (self.codebook_size,)
        return tuple(self.factors) if self.factors is not None else factorise(self.codebook_size)

    def unused(self) -> list[str]:
        """Options away from their defaults that reach nothing in this network."""
        names = [] if self.factorised else ["pair_layers", "factors"]
        names += ["modulated"] if self.factorised or self.network == "gpt" else []
        names += [] if self.adaptive else ["gamma_init"]
        return self.changed(names)

    @model_validator(mode="after")
    def _consistent(self) -> "NextTokenConfig":
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UsageError(
                f"width / heads must be a multiple of 4 (two axes of rotated pairs), got {self.width} / {self.heads}"
            )
        if self.network == "gpt" and self.head == "factorised":
            raise UsageError('network = "gpt" predicts a token at once; leave head out')
        if self.head not in ("auto", "plain", "factorised"):
            raise unknown("head", self.head, ("auto", "factorised", "plain"))
        vocabularies = self.vocabularies
        if self.factorised and (
            len(vocabularies) != 2 or min(vocabularies) < 2 or math.prod(vocabularies) != self.codebook_size
        ):
            raise UsageError(
                f"factors must be two numbers whose product is codebook_size = {self.codebook_size}, "
                f"got {list(vocabularies)}"
            )
        for name in self.unused():
            network = "a factorised head" if self.factorised else "a plain head"
            if name in ("gamma_init", "modulated") and not self.factorised:
                network = 'network = "gpt"' if self.network == "gpt" else "a network with modulated = false"
            raise UsageError(f"{name} reaches nothing in {network}; leave it out")
        return self

    @classmethod
    def from_folder(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """Earlier versions took options that reached nothing, and wrote them down; they are left out here."""
        kept = dict(table)
        size = kept.get("codebook_size")
        small = not isinstance(size, int) or size < LARGEST_PLAIN_HEAD  # a size that is none is refused by the check
        plain = kept.get("head") == "plain" or (kept.get("head", "auto") == "auto" and small)
        idle = ["pair_layers", "factors"] if plain else ["modulated", "gamma_init"]
        if kept.get("modulated") is False:
            idle += ["gamma_init"]
        return {name: value for name, value in kept.items() if name not in idle}


def factorise(codebook_size: int) -> tuple[int, int]:
    """Two factors of a codebook's size, the first as near its cube root as divisors allow: 262,144 is 64 x 4,096.

    Raises:
        UsageError: the size is a prime.
    """
    divisors = [d for d in range(2, math.isqrt(codebook_size) + 1) if codebook_size % d == 0]
    if not divisors:
        raise UsageError(
            f'a factorised head needs a codebook size with factors, and {codebook_size} is prime; use head = "plain"'
        )
    first = min(divisors, key=lambda d: abs(math.log(d) - math.log(codebook_size) / 3))
    return first, codebook_size // first
