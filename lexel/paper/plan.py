"""Recipes of the paper's tables: rows of `tables.toml` as whole recipes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import model_validator

from lexel.autoencoders import autoencoder_class
from lexel.compare.plan import PlannedRun
from lexel.config import Config, check, find_recipe, override, read
from lexel.errors import unknown
from lexel.generators import GENERATORS
from lexel.generators.config import GROUP
from lexel.quantizers.registry import quantizer_class
from lexel.registry import lookup
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.objective import image_terms
from lexel.train.recipes import TokenizerRecipe, outline

OWN = Path(__file__).with_name("tables.toml")
BASE, GENERATOR_BASE = "tables", "generator_tables"  # recipes of Lexel's


class TokenizerRow(Config):
    """Changes of the base recipe that make a tokenizer."""

    kind: str  # of the quantizer
    codebook_size: int | None = None  # the base's where nothing is said
    codebook_dim: int | None = None
    options: dict[str, Any] = {}  # of the quantizer
    weights: dict[str, float] = {}  # of its loss terms, instead of the published ones
    autoencoder: dict[str, Any] = {}  # with a kind it replaces the base's, else it changes it
    projections: bool = True
    train: dict[str, Any] = {}  # changes of the section train


class GeneratorRow(Config):
    """A family over the tokens of one of the tokenizers."""

    tokens: str  # a tokenizer's name
    network: dict[str, Any]  # kind and options; what follows from the tokens need not be said
    train: dict[str, Any] = {}
    sample: dict[str, Any] = {}  # settings of `Generator.sample`


class Row(Config):
    """A line of a table."""

    name: str
    run: str  # a name among the table's `of`
    published: list[str]  # one text for each of the table's columns


class Table(Config):
    """A table of a paper."""

    title: str
    of: Literal["tokenizers", "generators"] = "tokenizers"
    source: str  # where the published numbers stand, and under which conditions
    columns: list[str]  # of the published numbers
    rows: list[Row]

    @model_validator(mode="after")
    def _whole(self) -> "Table":
        for row in self.rows:
            if len(row.published) != len(self.columns):
                raise ValueError(f"row {row.name!r} has {len(row.published)} published texts for {self.columns}")
        return self


class Tables(Config):
    """The file of tables."""

    tokenizers: dict[str, TokenizerRow]
    generators: dict[str, GeneratorRow] = {}
    tables: dict[str, Table]

    @model_validator(mode="after")
    def _named(self) -> "Tables":
        for name, row in self.generators.items():
            if row.tokens not in self.tokenizers:
                raise ValueError(f"generators.{name}.tokens names {row.tokens!r}, which is no tokenizer here")
        for name, table in self.tables.items():
            for line in table.rows:
                if line.run not in getattr(self, table.of):
                    raise ValueError(f"tables.{name}: {line.name!r} names {line.run!r}, not among the {table.of}")
        return self


def read_tables(path: str | Path = OWN) -> Tables:
    """The tables of a file; Lexel's own by default.

    Raises:
        UsageError: the file is missing, or something in it does not fit.
    """
    return check(read(path), Tables, Path(path).name)


def shorten(train: dict[str, Any], steps: int | None) -> None:
    """Sets the steps of a section `train`, and what is counted in them along; None leaves them."""
    if steps is None:
        return
    half = max(1, steps // 2)
    train |= {"steps": steps, "validate_every": half, "save_every": half, "log_every": max(1, min(50, steps // 4))}
    if "schedule" in train:
        train["schedule"] = {**train["schedule"], "warm_up": max(1, steps // 20)}


@dataclass(frozen=True)
class TablesPlan:
    """The tables chosen, and a recipe for every tokenizer and generator in them.

    Attributes:
        file: the definitions.
        chosen: names of tables, in the file's order.
        tokenizers: those that the tables name, and those whose tokens their generators learn.
        base: of the generators' recipes.
    """

    file: Tables
    chosen: tuple[str, ...]
    tokenizers: dict[str, PlannedRun]
    base: dict[str, Any]

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Every run once, ("tokenizers" or "generators", name), in the order in which they are made."""
        order: dict[tuple[str, str], None] = {}
        for name in self.chosen:
            table = self.file.tables[name]
            for row in table.rows:
                if table.of == "generators":
                    order["tokenizers", self.file.generators[row.run].tokens] = None
                order[table.of, row.run] = None
        return [*order]

    @property
    def generators(self) -> list[str]:
        """The generators' names."""
        return [name for kind, name in self.runs if kind == "generators"]

    def generator(self, name: str, folder: Path, classes: int | None) -> GeneratorRecipe:
        """The recipe of a generator.

        Args:
            name: among `generators`.
            folder: of the tables, with tokens and tokenizers.
            classes: of the images' labels; None where there are none.

        Raises:
            UsageError: a family, option or layout of tokens does not fit.
        """
        row = self.file.generators[name]
        tokenizer = self.tokenizers[row.tokens].recipe
        table = {part: dict(value) for part, value in self.base.items()}
        shared = {key: table["generator"][key] for key in ("width", "layers", "heads")}
        table["generator"] = {**shared, **layout(tokenizer, row.network, classes), **row.network}
        tokens = folder / "tokens" / row.tokens
        table["data"] = {"tokens": str(tokens / "train"), "validation": str(tokens / "validation")}
        table["data"]["tokenizer"] = str(folder / "tokenizers" / row.tokens)
        table["train"] |= row.train
        return check(table, GeneratorRecipe, f"generators.{name}")


def layout(recipe: TokenizerRecipe, network: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    """The options of a family that follow from a tokenizer's tokens and the classes of its images."""
    fields = lookup(GENERATORS, str(network.get("kind")), "generator", GROUP).Config.model_fields
    tokenizer = outline(recipe.model)
    spec = tokenizer.token_spec(recipe.data.size, recipe.data.size)
    found: dict[str, Any] = {"codebook_size": spec.codebook_size, "codebook_dim": tokenizer.quantizer.codebook_dim}
    found |= {"channels": tokenizer.quantizer.codebook_dim, "books": spec.books}
    if len(spec.grids) > 1:
        found["scales"] = [grid[0] for grid in spec.grids]
    elif len(spec.grids[0]) == 2:
        found |= {"rows": spec.grids[0][0], "columns": spec.grids[0][1]}
    else:
        found["grid"] = list(spec.grids[0])
    if classes is None:
        found["condition"] = {"kind": "none"}
    else:
        found["classes"] = classes
    return {name: value for name, value in found.items() if name in fields and value is not None}


class BaseRecipes(NamedTuple):
    """The tables of options that every row's recipe starts from, and the tokenizers' as a checked recipe."""

    tokenizers: dict[str, Any]
    generators: dict[str, Any]
    recipe: TokenizerRecipe


def base_recipes(
    data: str,
    size: int | None = None,
    steps: int | None = None,
    generator_steps: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    generator_overrides: Sequence[str] = (),
) -> BaseRecipes:
    """The base recipes of all rows.

    Args:
        data: the pictures: what `data.source` takes.
        size: pixels a side; the base recipe's by default.
        steps, generator_steps: of each tokenizer and generator; the base recipes' by default.
        seed: of weights, data order and samples.
        overrides: `section.key=value` of the tokenizers' base recipe.
        generator_overrides: of the generators' base recipe.

    Raises:
        UsageError: an option does not fit.
    """
    changes = [f"data.source={data}", *([f"data.size={size}"] if size else []), *overrides]
    base = override(read(find_recipe(BASE)), changes, TokenizerRecipe)
    generator_base = override(read(find_recipe(GENERATOR_BASE)), generator_overrides, GeneratorRecipe)
    shorten(base["train"], steps)
    shorten(generator_base["train"], generator_steps)
    base["train"] |= {"seed": seed, "collapse_patience": 0}  # a collapse is a result too
    generator_base["train"]["seed"] = seed
    return BaseRecipes(base, generator_base, check(dict(base), TokenizerRecipe, f"{BASE}.toml"))


def choose_tables(tables: Tables, only: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the chosen tables in the file's order, all by default.

    Raises:
        UsageError: there is no such table.
    """
    for name in only:
        if name not in tables.tables:
            raise unknown("table", name, tables.tables)
    return tuple(name for name in tables.tables if not only or name in only)


def make_plan(tables: Tables, base: BaseRecipes, chosen: tuple[str, ...]) -> TablesPlan:
    """Every tokenizer of the chosen tables as a whole recipe, its network laid out: checked before any is trained.

    Raises:
        UsageError: a recipe does not fit.
    """
    images = image_terms(base.recipe.train)
    pixels = {term: weight for term, weight in base.tokenizers["train"]["weights"].items() if term in images}
    plan = TablesPlan(tables, chosen, {}, base.generators)
    rows = {name: tables.tokenizers[name] for kind, name in plan.runs if kind == "tokenizers"}
    return replace(plan, tokenizers={name: planned(name, row, base.tokenizers, pixels) for name, row in rows.items()})


def planned(name: str, row: TokenizerRow, base: Mapping[str, Any], pixels: Mapping[str, float]) -> PlannedRun:
    """The recipe of a row of tokenizers, with the weights of `pixels` for the terms of pictures."""
    table = {part: dict(value) for part, value in base.items()}
    own = table["model"]["quantizer"]
    quantizer: dict[str, Any] = {
        "kind": row.kind,
        "codebook_size": row.codebook_size or own["codebook_size"],
        "codebook_dim": row.codebook_dim or own["codebook_dim"],
        **row.options,
    }
    if "codebook_size" not in inspect.signature(quantizer_class(row.kind)).parameters:  # continuous latents
        del quantizer["codebook_size"]
    network = dict(row.autoencoder) if "kind" in row.autoencoder else table["model"]["autoencoder"] | row.autoencoder
    if "kind" in row.autoencoder:
        sides = autoencoder_class(network["kind"]).config_class.model_fields.get("size")
        if sides is not None and sides.default is not None:  # made for pictures of one size
            network["size"] = table["data"]["size"]
    table["model"] = {"quantizer": quantizer, "autoencoder": network, "projections": row.projections}
    table["train"] |= row.train
    table["train"]["weights"] = {**pixels, **row.weights}
    recipe = check(table, TokenizerRecipe, f"tokenizers.{name}").resolved()
    return PlannedRun(name, quantizer.get("codebook_size", 1), quantizer["codebook_dim"], recipe.train.seed, recipe)
