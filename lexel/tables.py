"""The entries of every table, each with the first line of its documentation."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from lexel import config
from lexel.errors import UsageError, unknown
from lexel.registry import lookup, names

# The module and name of each table, and the entry points by which other packages extend it.
TABLES: dict[str, tuple[str, str, str | None]] = {
    "quantizers": ("lexel.quantizers", "QUANTIZERS", "lexel.quantizers"),
    "autoencoders": ("lexel.autoencoders", "AUTOENCODERS", "lexel.autoencoders"),
    "generators": ("lexel.generators", "GENERATORS", "lexel.generators"),
    "conditions": ("lexel.conditions", "CONDITIONS", "lexel.conditions"),
    "sources": ("lexel.data", "SOURCES", "lexel.sources"),
    "losses": ("lexel.losses", "LOSSES", "lexel.losses"),
    "discriminators": ("lexel.losses", "DISCRIMINATORS", "lexel.discriminators"),
    "perturbations": ("lexel.losses", "PERTURBATIONS", "lexel.perturbations"),
    "backbones": ("lexel.networks.backbones", "BACKBONES", "lexel.backbones"),
    "metrics": ("lexel.evaluate", "METRICS", "lexel.metrics"),
    "probes": ("lexel.evaluate", "PROBES", None),
    "public_sets": ("lexel.public_sets", "PUBLIC_SETS", None),
    "protocols": ("lexel.metrics.protocols", "PROTOCOLS", "lexel.protocols"),
    "transforms": ("lexel.data", "TRANSFORMS", None),
    "networks": ("lexel.networks", "FEATURE_NETWORKS", "lexel.networks"),
    "families": ("lexel.convert", "FAMILIES", "lexel.families"),
}
RECIPES = "recipes"


def entries(table: str) -> list[tuple[str, str]]:
    """The names of a table and a line about each, sorted by name.

    Args:
        table: a key of TABLES, or "recipes".

    Raises:
        UsageError: there is no such table.
    """
    if table == RECIPES:
        return sorted(_recipes())
    if table not in TABLES:
        raise unknown("table", table, [*TABLES, RECIPES])
    module, name, group = TABLES[table]
    found: Mapping[str, Any] = getattr(import_module(module), name)
    return [(key, _line(found, key, table, group)) for key in names(found, group)]


def _line(found: Mapping[str, Any], key: str, table: str, group: str | None) -> str:
    """The line about an entry; one of another package that cannot be loaded says so, and does not end the list."""
    try:
        return _summary(lookup(found, key, table, group))
    except UsageError as error:
        return str(error)


def _recipes() -> Iterator[tuple[str, str]]:
    """Lexel's own recipes and the first comment of each."""
    for name, path in config.own_recipes().items():
        yield name, path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def _summary(entry: Any) -> str:
    """One line on an entry of a table."""
    for attribute in ("summary", "title"):
        text = getattr(entry, attribute, None)
        if isinstance(text, str):
            return text.split("\n")[0]
    documented: Callable[..., Any] | None = entry if inspect.isclass(entry) or inspect.isroutine(entry) else None
    return (inspect.getdoc(documented) or "").split("\n")[0] if documented else ""
