"""The table of quantizers, filled by `lexel.quantizers`, and building one by its name."""

from collections.abc import Mapping
from typing import Any

from lexel import registry
from lexel.errors import UsageError
from lexel.quantizers.base import Quantizer, Table
from lexel.quantizers.continuous import Continuous
from lexel.quantizers.gaussian import Gaussian
from lexel.runtime import without_weights

GROUP = "lexel.quantizers"  # the entry points by which other packages add theirs

QUANTIZERS: dict[str, type[Quantizer]] = {}

# What `build` knows besides the methods: a baked table, and no quantization at all.
OTHERS: dict[str, type[Quantizer]] = {"table": Table, "none": Continuous, "gaussian": Gaussian}


def build(kind: str, options: Mapping[str, Any]) -> Quantizer:
    """A quantizer from its name and the arguments of its constructor.

    Args:
        kind: a key of QUANTIZERS, "table", "none", or the name of an entry point `lexel.quantizers` of another package.
        options: the constructor's arguments, as a recipe or `config.json` has them.

    Raises:
        UsageError: the kind or an option is unknown, a required option is missing, or a value is of a wrong type or
            out of its range.
    """
    return registry.build(quantizer_class(kind), kind, options, "quantizer")


def quantizer_class(kind: str) -> type[Quantizer]:
    """The class of a quantizer by its name.

    Raises:
        UsageError: nobody has registered that name.
    """
    if not isinstance(kind, str):
        raise UsageError(f"the quantizer's kind must be a name such as 'ibq', got {kind!r}")
    found = registry.lookup(QUANTIZERS | OTHERS, kind, "quantizer", GROUP)
    if not (isinstance(found, type) and issubclass(found, Quantizer)):
        raise UsageError(f"quantizer {kind!r} is registered as {found!r}, which is no lexel.quantizers.Quantizer")
    return found


def names() -> list[str]:
    """The names of all quantizers, those of other packages included, sorted."""
    return registry.names(QUANTIZERS, GROUP)


def outline(table: Mapping[str, Any]) -> Quantizer:
    """A quantizer without memory (on the meta device), to ask what it is; `table` is a recipe's, with its kind.

    Raises:
        UsageError: as in `build`.
    """
    options = dict(table)
    with without_weights():
        return build(options.pop("kind", ""), options)
