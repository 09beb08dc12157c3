"""How many images of a set may be unreadable, and how those that are are told."""

from collections.abc import Mapping
from typing import Any

from lexel.data.files import first_reason
from lexel.errors import UsageError

NAMED = 20  # unreadable images whose reasons a result holds; the others are only counted


def too_many(count: int, total: int, allowed: float) -> bool:
    """Whether `count` unreadable images are more than a part `allowed` of `total`; 1 allows any number."""
    return allowed < 1 and count > allowed * total


def check_unreadable(unreadable: Mapping[str, str], total: int, allowed: float) -> None:
    """Refuses a set of which more than a part is unreadable: the budget of training, encoding and measuring.

    Args:
        unreadable: the reasons so far, by name.
        total: images that they are counted against: of the set, or of the part of it that is read.
        allowed: in [0, 1]; 1 allows any number.

    Raises:
        UsageError: there are more.
    """
    if too_many(len(unreadable), total, allowed):
        raise UsageError(
            f"{len(unreadable):,} of {total:,} images cannot be read, more than max_unreadable = {allowed:g} allows; "
            f"{first_reason(unreadable)}"
        )


def counted(unreadable: Mapping[str, str]) -> dict[str, Any]:
    """Unreadable images as a result holds them: how many, and the reasons of the first by name."""
    ordered = sorted(unreadable.items())
    return {"count": len(ordered), "reasons": dict(ordered[:NAMED])}
