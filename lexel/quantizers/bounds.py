"""Ranges of options: a number outside its range is one clear error, whatever its type."""

import math
from typing import Any

from lexel.errors import UsageError

TABLE = 2**34  # numbers in a table: 64 GiB in float32
TEMPERATURES = (1e-12, 1e12)  # beyond, logits over the temperature are no float32 numbers


def integer(name: str, value: Any, least: int, most: int) -> int:
    """`value` if it is an integer from least to most.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise UsageError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise UsageError(f"{name} must be at most {most}, got {value}")
    return value


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """`value` if it is a finite number from least to most.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r}")
    if not least <= value <= most:
        limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UsageError(f"{name} must be {limits}, got {value:g}")
    return value


def temperature(name: str, value: Any) -> float:
    """`value` if it is a temperature that a softmax in float32 can use.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
        raise UsageError(f"{name} must be above 0, got {value}")
    return number(name, value, *TEMPERATURES)


def decay(value: Any) -> float:
    """`value` if it is the decay of a running average, in [0, 1).

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise UsageError(f"decay must be in [0, 1), got {value!r}")
    return value


def table(rows: int, columns: int) -> None:
    """Refuses a table that no machine has the memory for.

    Raises:
        UsageError: it has more than TABLE numbers.
    """
    if rows * columns > TABLE:
        raise UsageError(
            f"a table of {rows} x {columns} numbers takes {4 * rows * columns / 2**30:,.0f} GiB; "
            f"at most {4 * TABLE / 2**30:.0f} GiB are possible"
        )
