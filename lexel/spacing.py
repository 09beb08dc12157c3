"""Evenly spaced choices: folders are sorted by class, so the first items would all be of one class."""


def evenly_spaced(count: int, limit: int | None = None) -> list[int]:
    """At most `limit` of the numbers 0 to count - 1, evenly spaced; all of them where `limit` is None."""
    limit = count if limit is None else min(limit, count)
    return [number * count // limit for number in range(limit)]
