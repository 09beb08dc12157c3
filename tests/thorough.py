"""Which cases of a law wait for `-m thorough`: those whose likes are in the default tests."""

from typing import Any

import pytest


def thorough(*cases: Any) -> list[Any]:
    """Cases for `pytest.mark.parametrize` beside those of the default tests."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough) for case in cases]
