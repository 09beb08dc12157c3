"""The options of generators: those that all families share, and how a table becomes those of one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from lexel import registry
from lexel.conditions import Condition, build_condition
from lexel.config import Config, check
from lexel.errors import UsageError
from lexel.token_spec import TokenSpec

if TYPE_CHECKING:
    from lexel.generators.base import Generator

GENERATORS: dict[str, type["Generator"]] = {}  # by `generator.kind`; filled in lexel/generators/__init__.py
MOST_TOKENS = 2**16  # of an image: 256 x 256
GROUP = "lexel.generators"  # entry points of other packages


class NetworkConfig(Config):
    """The options that all families share: the tokens and the condition. A family adds its network's.

    `rows` and `columns` are the grid of tokens; `grid` is for any other, as [32] for tokens on a line. `condition` is a
    table with a `kind` of `lexel.conditions.CONDITIONS` and its options; without it there are `classes`
    classes, dropped to the null class, which they do not count, at the rate `class_dropout`.
    """

    LARGEST: ClassVar[int] = 2**24
    LARGER: ClassVar[dict[str, int]] = {"codebook_size": 2**40}

    kind: str
    codebook_size: int = Field(default=16384, ge=2)
    rows: int = Field(default=16, ge=1)
    columns: int = Field(default=16, ge=1)
    grid: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    condition: dict[str, Any] | None = None
    classes: int = Field(default=1000, ge=1)
    class_dropout: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> "NetworkConfig":
        if self.tokens > MOST_TOKENS:
            raise UsageError(f"an image of {self.tokens:,} tokens is too large; at most {MOST_TOKENS:,} are possible")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The grid of tokens: (rows, columns), (length,)."""
        return (self.rows, self.columns) if self.grid is None else tuple(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return math.prod(self.shape)

    @property
    def token_spec(self) -> TokenSpec:
        """The layout of tokens that the network is built for."""
        return TokenSpec((self.shape,), self.codebook_size)

    def make_condition(self, width: int) -> Condition:
        """The condition's module, for a network of so many channels."""
        table = {"kind": "class", "classes": self.classes, "dropout": self.class_dropout}
        return build_condition(width, table if self.condition is None else self.condition)

    def condition_in_words(self) -> str:
        """The condition in words: "class, 1,000 classes"."""
        if self.condition is None:
            return f"class, {self.classes:,} classes"
        options = ", ".join(f"{name} = {value}" for name, value in self.condition.items() if name != "kind")
        return f"{self.condition.get('kind')}{', ' * bool(options)}{options}"

    def check_fits(self, spec: TokenSpec, classes: Sequence[str] | None, source: str) -> None:
        """Refuses tokens that the network is not made for, and says which options would fit.

        Args:
            spec: the layout of the tokens.
            classes: the classes of their labels; None where there are none.
            source: names the tokens in errors.
        """
        if len(spec.grids) != 1 or spec.books is not None:
            raise UsageError(f"{source} has grids {spec.shape}; a {self.kind} generator needs one token at a place")
        grid = spec.grids[0]
        found: dict[str, Any] = {"codebook_size": spec.codebook_size}
        if len(grid) == 2 and self.grid is None:
            found |= {"rows": grid[0], "columns": grid[1]}
        else:
            found["grid"] = list(grid)
        if self.condition is None:
            found["classes"] = 1 if classes is None else len(classes)
        self.refuse_other(found, source + " (which have no labels)" * (classes is None))

    def refuse_other(self, found: Mapping[str, Any], source: str) -> None:
        """Refuses options that are not those found in tokens, and says which would fit."""
        wrong = [name for name, value in found.items() if getattr(self, name) != value]
        if wrong:
            ours = ", ".join(f"generator.{name} = {getattr(self, name)}" for name in wrong)
            theirs = ", ".join(f"generator.{name} = {found[name]}" for name in wrong)
            raise UsageError(f"{ours} does not fit the tokens of {source}; set {theirs}")

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of the options that are not at their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @classmethod
    def from_folder(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The options in a folder that any version of Lexel wrote, as this version takes them."""
        return dict(table)

    @model_serializer(mode="wrap")
    def _without_what_is_newer(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Options that came later are written only where they say something, so that fingerprints stay."""
        table: dict[str, Any] = handler(self)
        newer: dict[str, Any] = {"kind": "next_token", "network": "llama", "grid": None, "condition": None}
        newer |= {"times": "uniform", "stratified": False}
        return {name: value for name, value in table.items() if name not in newer or value != newer[name]}


def family_of(config: NetworkConfig) -> type["Generator"]:
    """The class of the family whose options these are."""
    return registry.lookup(GENERATORS, config.kind, "generator", GROUP)


def network_config(table: Any) -> Any:
    """The typed options of a family, by their `kind`; a recipe without one means next_token.

    Raises:
        UsageError: no such family, or it has not these options.
    """
    if not isinstance(table, Mapping):
        return table  # typed already; pydantic refuses anything else
    kind = table.get("kind", "next_token")
    if not isinstance(kind, str):
        raise UsageError(f"kind must be a text, got {kind!r}")
    family = registry.lookup(GENERATORS, kind, "generator", GROUP)
    return check(dict(table), family.Config, kind)


NetworkOptions = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(network_config)]


class GeneratorConfig(Config):
    """Network, fingerprint of the tokenizer, names of the classes."""

    transformer: NetworkOptions  # the options of the family
    tokenizer: str | None = None  # fingerprint; tokens of another tokenizer mean other images
    class_names: list[str] | None = None


def read_config(table: Mapping[str, Any], source: str) -> GeneratorConfig:
    """The configuration in a model folder or training state, whatever version wrote it."""
    options = table.get("transformer")
    if isinstance(options, Mapping) and isinstance(options.get("kind", "next_token"), str):
        family = registry.lookup(GENERATORS, options.get("kind", "next_token"), f"generator of {source}:", GROUP)
        table = {**table, "transformer": family.Config.from_folder(options)}
    return check(dict(table), GeneratorConfig, source)
