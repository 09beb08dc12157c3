"""Every fixture of a published implementation that has a checker holds."""

import os
from pathlib import Path

import pytest
import torch

from tests.parity import account, checker
from tests.parity.__main__ import main
from tests.parity.fixture import Fixture

FOLDER = Path(os.environ.get("LEXEL_PARITY", Path(__file__).parents[2] / "shared" / "parity")) / "families"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.pt")), ids=lambda path: path.stem)
def test_the_published_implementation_and_ours_give_the_same_numbers(path):
    fixture = Fixture.open(path)
    check = checker(fixture)
    if check is None:
        pytest.skip(f"no checker for {fixture.family!r}")
    check(fixture)
    account(fixture)
    assert fixture.compared
    assert not fixture.faults, str(fixture)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", {"weight": torch.ones(2)}, [1], {"family": "Nothing known"}, {"family": "DiT"}]
)
def test_a_file_that_is_no_fixture_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main([str(path)]) != 0
    assert capsys.readouterr().out.count("\n") == 1


SCHEDULES = {
    "family": "mask counts after each step",
    "remasked_after_step": {"n16_steps5": [13, 11, 9, 6, 1]},
    "cfg_power_cosine": {"scale4.0_pow0.0_steps3": [4.0, 4.0, 4.0]},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "; ok"),
        ({"cfg_power_cosine": {"scale4.0_pow0.0_steps3": [4.0, 4.0, 4.1]}}, "differs by"),
        ({"remasked_after_step": {"n16_steps5": [13, 11, 9, 6, 2]}}, "differ in"),
        ({"f64": {"count": 3}}, "f64/count was compared with nothing"),
        ({"f64": {"counts": [{"of": torch.ones(1)}]}}, "f64/counts/0/of was compared with nothing"),
    ],
)
def test_a_file_holds_where_every_result_of_it_was_compared_and_is_ours(tmp_path, capsys, changes, said):
    path = tmp_path / "schedules.pt"
    torch.save({**SCHEDULES, **changes}, path)
    assert main([str(path)]) == (0 if said == "; ok" else 1)
    assert said in capsys.readouterr().out
