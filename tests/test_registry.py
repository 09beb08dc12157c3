"""Tables: names, entry points, and options checked against signatures."""

import dataclasses
from importlib.metadata import EntryPoint
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from lexel import registry
from lexel.convert import FAMILIES, convert, files, recognise
from lexel.errors import UsageError
from lexel.evaluate import PROTOCOLS
from lexel.evaluate.rules import find_protocol
from lexel.registry import build, fits, lookup, names
from lexel.tables import TABLES, entries


class Thing:
    def __init__(
        self, size: int, rate: float = 0.5, mode: Literal["a", "b"] = "a", levels: list[int] | None = None
    ) -> None:
        self.given = size, rate, mode, levels


@pytest.fixture
def elsewhere(monkeypatch):
    points = [
        EntryPoint("theirs", f"{__name__}:Thing", "lexel.things"),
        EntryPoint("gone", "nowhere:X", "lexel.things"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])


def test_options_are_handed_to_the_constructor():
    assert build(Thing, "thing", {"size": 3, "rate": 1, "levels": [2, 3]}, "thing").given == (3, 1, "a", [2, 3])


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "thing 'thing' needs the option 'size'"),
        ({"size": 3, "sise": 3}, "no option 'sise'; its options are size, rate, mode, levels"),
        ({"size": "3"}, "size = '3' is not an integer"),
        ({"size": 1.5}, "size = 1.5 is not an integer"),
        ({"size": True}, "size = True is not an integer"),
        ({"size": 10**30}, "is not an integer"),
        ({"size": 3, "rate": float("nan")}, "rate = nan is not a finite number"),
        ({"size": 3, "mode": "c"}, "mode = 'c' is not one of 'a', 'b'"),
        ({"size": 3, "levels": [2, "3"]}, "is not a list of integers"),
    ],
)
def test_an_option_of_a_wrong_name_or_type_is_told(options, message):
    with pytest.raises(UsageError, match=message):
        build(Thing, "thing", options, "thing")


def test_an_unknown_name_is_answered_with_the_names_there_are(elsewhere):
    with pytest.raises(UsageError, match="unknown thing 'x'; choose from gone, own, theirs"):
        lookup({"own": Thing}, "x", "thing", "lexel.things")


def test_another_package_can_register_a_name(elsewhere):
    assert lookup({"own": int}, "theirs", "thing", "lexel.things") is Thing
    assert names({"own": int}, "lexel.things") == ["gone", "own", "theirs"]


STRICT = dataclasses.replace(PROTOCOLS["lexel"], name="strict")
OTHERS = dataclasses.replace(FAMILIES["ibq"], name="others", fits=lambda names: "a_name_of_theirs" in names)


def test_protocols_and_published_layouts_may_come_from_other_packages(monkeypatch, tmp_path):
    points = [
        EntryPoint("strict", f"{__name__}:STRICT", "lexel.protocols"),
        EntryPoint("others", f"{__name__}:OTHERS", "lexel.families"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    assert find_protocol("strict") is STRICT
    save_file({"a_name_of_theirs": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    assert recognise(files.read(tmp_path / "theirs.safetensors")) is OTHERS
    with pytest.raises(UsageError, match="a_name_of_theirs"):  # which its table does not have
        convert(tmp_path / "theirs.safetensors", "others")
    assert "others" in dict(entries("families"))
    assert "strict" in dict(entries("protocols"))


def test_an_entry_point_that_cannot_be_imported_is_told(elsewhere):
    with pytest.raises(UsageError, match="cannot be loaded"):
        lookup({}, "gone", "thing", "lexel.things")


def test_a_tuple_of_fixed_length_is_checked_item_by_item():
    assert fits([0.9, 0.99], tuple[float, float])
    assert not fits([0.9], tuple[float, float])
    assert not fits([0.9, "x"], tuple[float, ...])


def test_every_entry_of_a_table_has_a_line_of_its_own():
    for table in TABLES:
        lines = dict(entries(table))
        assert all(lines.values()), (table, lines)
        assert len({*lines.values()}) == len(lines), (table, lines)
