"""Every fixture of a published implementation that has a checker holds."""

import os
from pathlib import Path

import pytest

from tests.parity import checker, not_compared
from tests.parity.fixture import Fixture

FOLDER = Path(os.environ.get("LEXEL_PARITY", Path(__file__).parents[2] / "shared" / "parity")) / "families"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.pt")), ids=lambda path: path.stem)
def test_the_published_implementation_and_ours_give_the_same_numbers(path):
    fixture = Fixture.open(path)
    check = checker(fixture)
    if check is None:
        pytest.skip(f"no checker for {fixture.family!r}")
    check(fixture)
    assert fixture.compared
    assert not fixture.faults, str(fixture)
    assert not_compared(fixture) == []
