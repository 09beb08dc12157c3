"""The runs of a comparison: a recipe with every quantizer, codebook size, code dimension and seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexel import quantizers as table
from lexel.config import Config, check, read
from lexel.errors import UsageError, unknown
from lexel.train.objective import image_terms
from lexel.train.tokenizer import TokenizerRecipe

UNQUANTIZED = "none"  # the same network without codes: how much of the error is theirs


class Variant(Config):
    """A quantizer with options of its own, under a name of its own."""

    kind: str  # the name of a quantizer
    options: dict[str, Any] = {}  # of its constructor
    weights: dict[str, float] = {}  # of its loss terms, instead of the published ones
    train: dict[str, Any] = {}  # changes of the recipe's section train, such as a schedule


class PlannedRun(NamedTuple):
    """One training of a comparison."""

    label: str  # the quantizer's name, or the variant's
    codebook_size: int
    codebook_dim: int
    seed: int
    recipe: TokenizerRecipe

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.label}-{self.codebook_size}x{self.codebook_dim}-seed{self.seed}"


def expand(
    recipe: TokenizerRecipe,
    quantizers: Sequence[str],
    codebook_sizes: Sequence[int] = (),
    dims: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    variants: Mapping[str, Variant] | None = None,
) -> list[PlannedRun]:
    """All runs of a comparison, checked; seeds change slowest, so that every method has a result early."""
    variants = variants or {}
    known = [*table.names(), UNQUANTIZED]
    for label, variant in variants.items():
        if label in known:
            raise UsageError(f"the variant {label!r} has a quantizer's name; choose another, such as '{label}_2'")
        if variant.kind not in known:
            raise UsageError(
                f"variant {label!r}: unknown kind {variant.kind!r}; choose from {', '.join(sorted(known))}"
            )
    for label in quantizers:
        if label not in known and label not in variants:
            raise unknown("quantizer", label, [*known, *variants])
    for what, values in (("quantizers", quantizers), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{what} must be given, each once; got {list(values) or 'none'}")
    own = recipe.model.quantizer
    sizes = codebook_sizes or [own["codebook_size"]]
    widths = dims or [own["codebook_dim"]]
    return [
        PlannedRun(label, size, dim, seed, _recipe_of(recipe, label, variants.get(label), size, dim, seed))
        for seed in seeds
        for size in sizes
        for dim in widths
        for label in quantizers
        if label != UNQUANTIZED or size == sizes[0]  # it has no codes to count
    ]


def _recipe_of(
    recipe: TokenizerRecipe, label: str, variant: Variant | None, size: int, dim: int, seed: int
) -> TokenizerRecipe:
    """The recipe with this quantizer, and nothing else changed but what a variant says."""
    own = dict(recipe.model.quantizer)
    variant = variant or Variant(kind=label)
    is_own = label == own["kind"]
    options = own if is_own else variant.options
    table = as_table(recipe)
    count = {} if variant.kind == UNQUANTIZED else {"codebook_size": size}
    table["model"]["quantizer"] = {**options, "kind": variant.kind, **count, "codebook_dim": dim}
    images = {*image_terms(recipe.train)}
    shared = {term: weight for term, weight in recipe.train.weights.items() if is_own or term in images}
    # Where a codebook collapses, what it does until the end is a result too.
    table["train"] |= {"collapse_patience": 0, **variant.train, "seed": seed}
    table["train"]["weights"] = {**shared, **variant.weights}
    return check(table, TokenizerRecipe, f"{label} with {size} codes of dimension {dim}").resolved()


def read_variants(path: str | Path) -> dict[str, Variant]:
    """Variants from a TOML file with a table for each, such as `[ibq_st]` with `kind` and `options`.

    Raises:
        UsageError: the file is missing or a table is no variant.
    """
    entries = read(path)
    for label, entry in entries.items():
        if not isinstance(entry, dict):
            raise UsageError(f"{Path(path).name}: {label} is a value; variants are tables such as [{label}]")
    return {label: check(entry, Variant, f"{Path(path).name}, [{label}]") for label, entry in entries.items()}


def as_table(recipe: Config) -> dict[str, Any]:
    """The recipe as JSON stores it."""
    return recipe.model_dump(mode="json", exclude_none=True)
