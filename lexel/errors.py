"""The error for mistakes the user can fix."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any


class UsageError(ValueError):
    """Something the user can fix: one line that says what was wrong, what was given and what would work.

    The command line prints the message without a traceback and exits with code 2.
    """


def unknown(what: str, given: object, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not in a table, with the names that are."""
    return UsageError(f"unknown {what} {given!r}; choose from {', '.join(sorted(choices))}")


def optional(module: str, message: str) -> Any:
    """A package that not everybody has installed.

    Raises:
        UsageError: with `message`, which says what needs it and how it is installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(message) from None


def some(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    """The first names of a list and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + more
