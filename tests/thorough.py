"""Which cases of a law wait for `-m thorough`: those whose likes are in the default tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(*cases: Any) -> list[Any]:
    """Cases for `pytest.mark.parametrize` beside those of the default tests."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough) for case in cases]


def families(names: Iterable[str]) -> list[Any]:
    """Names as cases, of which a family's variants, written `family-variant`, are thorough."""
    names = list(names)
    return [*(name for name in names if "-" not in name), *thorough(*(name for name in names if "-" in name))]
