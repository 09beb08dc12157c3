"""The fuzz of readers: what once failed is kept, and tried first."""

import re
from pathlib import Path

import fuzz
import pytest
from fuzz import CORPUS, survives

from lexel.errors import UsageError


def read_numbers(path: Path) -> list[int]:
    """A reader with a fault: it refuses what is no number in one line, and forgets that a text may be no UTF-8."""
    try:
        return [int(line) for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise UsageError(f"{path} holds other things than numbers") from None


@pytest.mark.parametrize(("count", "kind"), [(300, "a kind")])
def test_an_input_that_fails_is_kept_with_its_reader_and_seed_and_tried_first(tmp_path, monkeypatch, count, kind):
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    path = tmp_path / "numbers.txt"
    path.write_text("1\n22\n333\n")
    with pytest.raises(AssertionError, match=r"^mutation (\d+) of seed 5, kept as .*: UnicodeDecodeError") as failed:
        survives(read_numbers, path, 5, count)
    number = int(re.search(r"mutation (\d+)", str(failed.value))[1])
    (kept,) = (path for path in (tmp_path / "corpus").rglob("*") if path.is_file())
    reader = "an_input_that_fails_is_kept_with_its_reader_and_seed_and_tried_first/a_kind"
    assert kept.relative_to(tmp_path / "corpus") == Path(reader, f"numbers.txt.5-{number}")
    assert kept.read_bytes() == list(fuzz.mutations(path.read_bytes(), 5, number + 1))[-1]
    with pytest.raises(AssertionError, match=rf"^{reader}/numbers.txt.5-{number}: UnicodeDecodeError"):
        survives(read_numbers, path, 5, count=0)
    other = tmp_path / "others.txt"  # another file of the same test has its own
    other.write_text("1\n")
    assert survives(read_numbers, other, 5, count=0) == 0
    assert path.read_text() == "1\n22\n333\n"


def test_a_reader_that_must_read_everything_may_refuse_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    (tmp_path / "numbers.txt").write_text("1\n22\n333\n")
    with pytest.raises(AssertionError, match=r"refused, though it must be read: .*numbers.txt holds other things"):
        survives(read_numbers, tmp_path / "numbers.txt", 1, 100, always=True)
    assert len([path for path in (tmp_path / "corpus").rglob("*") if path.is_file()]) == 1


def test_every_input_that_is_kept_belongs_to_a_test_and_is_small_and_of_no_machine():
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    kept = [path for path in CORPUS.glob("*/**/*") if path.is_file()]
    assert len(kept) > 8
    for path in kept:
        assert f"def test_{path.relative_to(CORPUS).parts[0]}(" in sources
        assert path.stat().st_size < 100_000
        assert b"pytest-of-" not in path.read_bytes(), f"{path} names a folder of the machine it was found on"
