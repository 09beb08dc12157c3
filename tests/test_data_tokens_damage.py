"""Token sets with changed metadata: every file is checked when it is read, and what is wrong is one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import counts, survives

from lexel.data import TRANSFORMS, ArrayImages
from lexel.data.tokens import TokenSet, write_tokens
from lexel.data.tokens.write import check_plan
from lexel.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures with labels, in three shards."""
    array = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    images = ArrayImages(array, [f"ä/{n}.png" for n in range(10)], [n % 3 for n in range(10)], ["a", "b", "c"])
    encode = lambda images: ((images[:, 0, ::2, ::2] + 1) * 127.5).round().long()  # noqa: E731
    transform = TRANSFORMS["published"](4)
    options = {"grid": (2, 2), "codebook_size": 256, "fingerprint": "abc", "shard_size": 4}
    write_tokens(tmp_path / "t", images, transform, encode, provenance={"size": 4}, **options)
    return tmp_path / "t"


def everything(path: Path) -> tuple:
    tokens = TokenSet.open(path.parent)
    return tokens, tokens.tokens(range(len(tokens))), tokens.histogram()


def unsealed(path: Path, **changes) -> None:
    """Writes a file as a Lexel without checksums would have, with some keys changed."""
    table = json.loads(path.read_text()) | changes
    del table["checksum"]
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("name", ["tokens.json", "shard-00000.json", "shard-00002.json", "shard-00001.npy"])
@counts
def test_a_damaged_token_set_is_read_rightly_or_refused_in_one_line(folder, name, count):
    tokens, indices, _ = everything(folder / name)
    labels, names = tokens.labels.tolist(), list(tokens.names)

    def right(read: tuple) -> None:
        assert torch.equal(read[1], indices)
        assert (read[0].labels.tolist(), list(read[0].names)) == (labels, names)

    survives(everything, folder / name, seed=16, count=count, check=right)


@pytest.mark.parametrize("name", ["tokens.json", "shard-00001.json", "shard-00001.npy"])
@counts
def test_a_damaged_set_without_checksums_is_refused_in_one_line_or_consistent(folder, name, count):
    for path in folder.glob("*.json"):
        unsealed(path)

    def consistent(read: tuple) -> None:
        tokens, indices, _ = read
        assert indices.shape == (len(tokens.names), *tokens.grid)
        assert tokens.labels is None or len(tokens.labels) == len(tokens.names)
        assert tokens.labels is None or tokens.labels.max() < len(tokens.classes)

    assert everything(folder / "tokens.json")
    survives(everything, folder / name, seed=61, count=count, check=consistent)


@counts
def test_a_damaged_plan_of_an_unfinished_set_is_refused_in_one_line(folder, count):
    (folder / "tokens.json").rename(folder / "unfinished.json")
    survives(lambda path: TokenSet.open(path.parent), folder / "unfinished.json", seed=7, count=count)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("tokens.json", {"grid": [2, 0]}, "grid"),
        ("tokens.json", {"grid": "2x2"}, "grid"),
        ("tokens.json", {"codebook_size": "256"}, "codebook_size"),
        ("tokens.json", {"codebook_size": 257}, "need uint16"),
        ("tokens.json", {"codebook_size": 25}, "for 25 codes"),
        ("tokens.json", {"dtype": "object"}, "dtype"),
        ("tokens.json", {"crops": True}, "crops"),
        ("tokens.json", {"crops": 2}, "is needed"),
        ("tokens.json", {"shards": 2}, "2 shards do not hold 10 images"),
        ("tokens.json", {"classes": [1, 2, 3]}, "classes"),
        ("tokens.json", {"labelled": False}, "labelled"),
        ("tokens.json", {"names": "0" * 64}, "names"),
        ("shard-00001.json", {"labels": [0, 1, 2, 3]}, "label 3 for 3 classes"),
        ("shard-00001.json", {"labels": [0, 1]}, "2 labels for 4 names"),
        ("shard-00001.json", {"labels": [0, 1, 2, -1]}, "labels"),
        ("shard-00001.json", {"names": [1, 2, 3, 4]}, "names"),
        ("shard-00001.json", {"sha256": "a\nb"}, "sha256"),
        ("shard-00001.json", {"unreadable": ["a"]}, "unreadable"),
    ],
)
def test_every_key_has_a_type_and_bounds(folder, name, changes, words):
    for path in folder.glob("*.json"):
        unsealed(path, **(changes if path.name == name else {}))
    with pytest.raises(UsageError, match=words) as error:
        everything(folder / name)
    assert "\n" not in str(error.value)


def test_a_changed_label_or_name_is_found(folder):
    for key, change in (("labels", [2, 2, 2, 2]), ("names", ["x", "ä/5.png", "ä/6.png", "ä/7.png"])):
        copy = folder.with_name(key)
        shutil.copytree(folder, copy)
        path = copy / "shard-00001.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: change}))
        with pytest.raises(UsageError, match="checksum"):
            TokenSet.open(copy)
        unsealed(path)
        with pytest.raises(UsageError, match="lost its checksum"):
            TokenSet.open(copy)
        for other in copy.glob("*.json"):
            if other != path:
                unsealed(other)
        if key == "names":  # known without a checksum too: the set's own digest of all names
            with pytest.raises(UsageError, match="names in its shards"):
                TokenSet.open(copy)


def test_a_set_without_checksums_is_read_and_gone_on_with(folder):
    before = everything(folder / "tokens.json")
    for path in folder.glob("*.json"):
        unsealed(path)
    after = everything(folder / "tokens.json")
    assert torch.equal(before[1], after[1])
    assert before[0].names == after[0].names


def test_labels_are_matched_by_the_names_of_classes(folder):
    tokens = TokenSet.open(folder)
    matched = tokens.with_classes(["c", "x", "b", "a"])
    assert matched.classes == ["c", "x", "b", "a"]
    assert [matched.classes[label] for label in matched.labels] == [tokens.classes[label] for label in tokens.labels]
    assert torch.equal(matched.tokens(range(10)), tokens.tokens(range(10)))
    assert tokens.classes == ["a", "b", "c"]
    with pytest.raises(UsageError, match="unknown class 'c'; the classes are a, b"):
        tokens.with_classes(["a", "b"])
    assert tokens.subset([0, 3, 6]).with_classes(["a"]).labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("more", [{"books": 2}, {"grids": [[1, 1], [2, 2]]}, {"caption_features": {"length": 1}}])
def test_a_folder_of_tokens_with_another_layout_is_not_gone_on_with(more):
    plan = {"grid": [2, 2], "codebook_size": 16}
    for found, wanted in (({**plan, **more}, plan), (plan, {**plan, **more})):
        with pytest.raises(UsageError, match=next(iter(more))):
            check_plan(found, wanted, "it holds others")
