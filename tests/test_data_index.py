"""Indexes of large sets, mapped from the cache: the same set to the bit, and nothing that grows in a process."""

import hashlib
import itertools
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from test_data_sources import CAPTIONS, COUNT, LABELS, add, as_tar, own_cache, png, source  # noqa: F401

from lexel.data import TRANSFORMS, index_file, open_images, ordered_batches, tar, training_batches
from lexel.data.config import DataConfig, open_data
from lexel.data.digests import digest, rows
from lexel.data.index_file import MappedArray
from lexel.data.names import ChosenNames, Labels, Names

pytest.importorskip("pyarrow")
CROP = TRANSFORMS["published"](8)


@pytest.fixture
def large(monkeypatch):
    """Every set counts as large."""
    monkeypatch.setattr(index_file, "LARGE", 1)


@pytest.fixture
def indexes(tmp_path):
    """Lists the mapped files in the cache."""
    return lambda: sorted((tmp_path / "cache" / "indexes").glob("*.arrow"))


def batches(images, **options):
    return list(itertools.islice(training_batches(images, CROP, 4, seed=3, **options), 6))


def same(a, b) -> bool:
    return all(
        torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
        for one, two in zip(a, b, strict=True)
    )


def test_a_mapped_set_is_the_set_in_memory_to_the_bit(source, monkeypatch):  # noqa: F811
    plain = open_images(source)
    monkeypatch.setattr(index_file, "LARGE", 1)
    for _ in range(2):  # written, then found
        mapped = open_images(source)
        assert isinstance(mapped.names.ends, MappedArray)
        assert isinstance(mapped.labels.array, MappedArray)
        assert mapped.names == plain.names
        assert (mapped.labels, list(mapped.captions)) == (plain.labels, CAPTIONS)
        assert mapped.classes == plain.classes
        assert mapped.fingerprint() == plain.fingerprint()
        assert same(batches(mapped), batches(plain))
        assert same(batches(mapped, first_step=4)[:2], batches(plain)[4:])


def test_both_parts_of_a_mapped_set_are_those_of_a_set_in_memory(source, monkeypatch):  # noqa: F811
    config = DataConfig(source=source, size=8, validation=0.3)
    plain = open_data(config)
    monkeypatch.setattr(index_file, "LARGE", 1)
    for one, other in zip(plain, open_data(config), strict=True):
        assert isinstance(other.images.numbers, MappedArray)
        assert isinstance(other.images.names, ChosenNames)
        assert list(other.names) == list(one.names)
        assert (other.labels, list(other.captions)) == (one.labels, list(one.captions))
        assert other.fingerprint() == one.fingerprint()
        assert same(batches(other), batches(one))


def test_to_another_process_a_mapped_set_goes_as_its_place(large, source):  # noqa: F811
    images = open_images(source)
    held_out, _ = images.hold_out(0.3)
    for one in (images, held_out):
        again = pickle.loads(pickle.dumps(one))
        assert isinstance(again.labels.array, MappedArray)
        assert (list(again.names), again.labels) == (list(one.names), one.labels)
        assert again.fingerprint() == one.fingerprint()
    letters = "".join(images.names).encode()
    assert letters in pickle.dumps(Names(list(images.names)))
    assert letters not in pickle.dumps(images.names)
    Path(images.names.ends.place[0]).unlink()  # what is mapped is still there, its name is not
    assert pickle.loads(pickle.dumps(images.names)) == images.names
    assert pickle.loads(pickle.dumps(images.labels)) == LABELS


def test_a_changed_source_has_a_new_index_and_the_old_one_goes(large, tmp_path, indexes):
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    first = open_images(tmp_path / "images")
    before = indexes()
    (tmp_path / "images" / "new.png").write_bytes(png(0))
    second = open_images(tmp_path / "images")
    assert (len(before), len(indexes()), len(first), len(second)) == (1, 1, COUNT, COUNT + 1)
    assert before != indexes()
    assert sorted(first.names) == sorted(f"{number}.png" for number in range(COUNT))  # still mapped


def test_shards_that_are_known_are_not_indexed_again_and_one_that_changed_is(large, tmp_path, monkeypatch):
    location, made, index = as_tar(tmp_path), [], tar._indexed
    monkeypatch.setattr(tar, "_indexed", lambda *shard: made.append(shard[0].name) or index(*shard))
    open_images(location)
    assert len(open_images(location)) == COUNT
    assert sorted(made) == ["00.tar", "01.tar", "02.tar"]
    with tarfile.open(tmp_path / "01.tar", "a") as archive:
        add(archive, "900.png", png(0))
        add(archive, "900.cls", b"1")
    assert len(open_images(location)) == COUNT + 1


@counts
def test_a_damaged_mapped_index_is_made_again(large, tmp_path, indexes, count):
    location = as_tar(tmp_path)
    first = open_images(location)
    names, fingerprint = list(first.names), first.fingerprint()

    def is_the_same(images):
        assert (list(images.names), images.fingerprint()) == (names, fingerprint)

    (path,) = indexes()
    survives(
        lambda _: open_images(location), path, 9, min(count, 4000) // 4, is_the_same, always=True, name="index.arrow"
    )


def test_a_cache_that_cannot_be_written_costs_memory_alone(large, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"the index of 1 images cannot be kept: .*Not a directory"):
        assert list(open_images(tmp_path / "images").names) == ["a.png"]


def test_without_pyarrow_an_index_is_in_memory_and_a_huge_one_is_told(large, tmp_path, monkeypatch, indexes):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert list(open_images(tmp_path / "images").names) == ["a.png"]
    assert not indexes()
    monkeypatch.setattr(index_file, "HINT", 10)
    with pytest.warns(UserWarning, match=r"with pyarrow \(pip install 'lexel\[tokens\]'\) processes share it"):
        open_images(tmp_path / "images")


def test_names_that_are_no_utf_8_are_kept_as_they_are(large, tmp_path):
    (tmp_path / "images").mkdir()
    foreign = os.fsdecode(b"\xff\xe4.png")
    try:
        (tmp_path / "images" / foreign).write_bytes(png(2))
    except OSError:
        pytest.skip("this file system takes no such names")
    (tmp_path / "images" / "ä.png").write_bytes(png(1))
    images = open_images(tmp_path / "images")
    assert sorted(images.names) == sorted([foreign, "ä.png"])
    assert len(next(iter(ordered_batches(images, CROP, 4))).numbers) == 2


def test_a_fingerprint_does_not_depend_on_how_its_data_is_held():
    names, table = [f"{number:05d} ä" for number in range(70_000)], np.arange(140_000).reshape(-1, 2)
    whole = hashlib.sha256(json.dumps(["a", names, table.tolist(), [], {"b": 1}], sort_keys=True).encode()).hexdigest()
    assert digest(["a", iter(Names(names)), rows(table), iter([]), {"b": 1}]) == whole
    assert digest(["a", names, table.tolist(), [], {"b": 1}]) == whole


def test_chosen_names_and_labels_are_sequences_as_lists_are():
    names = Names(["a", "bb", "", "ccc", "ä"])
    chosen, plain = ChosenNames(names, np.array([4, 1, 1, 3])), ["ä", "bb", "bb", "ccc"]
    assert chosen == plain
    assert chosen == Names(plain)
    assert Names(plain) == chosen
    assert chosen != plain[:3]
    assert (len(chosen), chosen[-1], chosen[1:3], [*chosen, "d"]) == (4, "ccc", ["bb", "bb"], [*plain, "d"])
    assert chosen.take([3, 0]) == ["ccc", "ä"]
    assert Names.joined([Names(list(chosen)), names])[3:5] == ["ccc", "a"]
    assert (bytes(chosen.letters), chosen.ends.tolist()) == ("äbbbbccc".encode(), [2, 4, 6, 9])
    labels = Labels(np.array([3, 1, 2], np.int32))
    assert labels == [3, 1, 2]
    assert labels != [3, 1]
    assert (labels[1], type(labels[1]), labels[:2], list(labels), max(labels)) == (1, int, [3, 1], [3, 1, 2], 3)
