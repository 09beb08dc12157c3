"""Sequences for language models: the convention, known by hand, and the way back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fuzz import counts, survives

from lexel.data import TRANSFORMS, ArrayImages
from lexel.data.tokens import (
    SequenceFormat,
    SequenceSet,
    TokenSet,
    export_parquet,
    export_sequences,
    export_webdataset,
    write_tokens,
)
from lexel.errors import UsageError

FOREIGN = os.fsdecode(b"caf\xe9.png")  # a name that is no UTF-8


@pytest.fixture
def tokens(tmp_path: Path) -> TokenSet:
    """Four images of two versions, with captions and a name that is no text."""
    array = np.random.default_rng(0).integers(0, 256, (4, 4, 9, 3), np.uint8)
    images = ArrayImages(array, ["a.png", FOREIGN, "c.png", "d.png"], [0, 1, 0, 1], ["x", os.fsdecode(b"\xff")])
    images.captions = ["one", "two ä", "", "four"]
    encode = lambda images: ((images[:, 0, ::2, ::2] + 1) * 127.5).round().long()  # noqa: E731
    options = {"grid": (2, 2), "codebook_size": 256, "fingerprint": "abc", "shard_size": 3, "crops": 2}
    return write_tokens(tmp_path / "t", images, TRANSFORMS["published"](4), encode, **options)


def test_the_convention_is_the_one_that_is_written_down():
    grid = np.array([[[1, 2, 3], [4, 5, 6]]])
    form = SequenceFormat((2, 3), codebook_size=10, offset=100)
    assert (form.separator, form.begin, form.end, form.vocabulary_size) == (110, 111, 112, 113)
    assert form.ids(grid).tolist() == [[111, 101, 102, 103, 110, 104, 105, 106, 110, 112]]
    bare = SequenceFormat((2, 3), 10, rows=False, ends=False)
    assert bare.ids(grid).tolist() == [[1, 2, 3, 4, 5, 6]]
    books = SequenceFormat((2, 1, 2), 10, rows=False)  # two codes a place, side by side
    assert books.ids(np.array([[[[1, 2]], [[3, 4]]]])).tolist() == [[21, 1, 13, 2, 14, 22]]
    flat = SequenceFormat((3,), 10)
    assert flat.ids(np.array([[7, 8, 9]])).tolist() == [[11, 7, 8, 9, 12]]
    assert SequenceFormat((2, 2), 2**16 - 3).dtype == np.uint16
    assert SequenceFormat((2, 2), 2**16 - 2).dtype == np.uint32


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_every_format_is_read_back_exactly(grid, rows, ends):
    form = SequenceFormat(grid, 50, 1000, rows, ends)
    indices = np.random.default_rng(0).integers(0, 50, (3, *grid))
    sequences = form.ids(indices)
    assert sequences.shape == (3, form.length)
    for sequence, expected in zip(sequences, indices, strict=True):
        assert np.array_equal(form.indices(np.concatenate([[1, 2, 3], sequence])), expected)
    with pytest.raises(UsageError, match="no sequence of a"):
        form.indices(sequences[0][:-1])
    with pytest.raises(UsageError, match="no sequence of a"):
        form.indices(sequences[0] * 0)


def test_a_set_is_exported_with_captions_and_read_back_exactly(tokens, tmp_path):
    words = lambda text: list(text.encode())  # noqa: E731
    sequences = export_sequences(tokens, tmp_path / "s", offset=300, text_ids=words)
    again = SequenceSet(tmp_path / "s")
    assert len(again) == len(sequences) == 8
    for number in range(8):
        image, crop = divmod(number, 2)
        assert np.array_equal(again.indices(number), tokens.tokens([image], crop)[0].numpy())
        caption = words(tokens.captions[image])
        assert again[number][: len(caption)].tolist() == caption
        assert again[number][len(caption)] == again.format.begin
    assert (again.names, again.labels) == (list(tokens.names), [0, 1, 0, 1])
    assert np.fromfile(tmp_path / "s" / "tokens.bin", "<u2").tolist() == np.asarray(again.ids).tolist()
    with pytest.raises(UsageError, match="raise offset"):
        export_sequences(tokens, tmp_path / "u", offset=100, text_ids=words)
    with pytest.raises(UsageError, match="not empty"):
        export_sequences(tokens, tmp_path / "s")


@pytest.mark.parametrize("name", ["sequences.json", "tokens.index.npy", "tokens.bin"])
@counts
def test_damaged_sequences_are_refused_in_one_line(tokens, tmp_path, name, count):
    export_sequences(tokens, tmp_path / "s")

    def read(path: Path) -> list:
        sequences = SequenceSet(path.parent)
        return [sequences.indices(number) for number in range(len(sequences))]

    survives(read, tmp_path / "s" / name, seed=2, count=count)


def test_captions_come_with_the_tokens(tokens):
    assert list(tokens.captions) == ["one", "two ä", "", "four"]
    assert list(tokens.subset([3, 0]).captions) == ["four", "one"]


def test_parquet_and_webdataset_hold_sequences_captions_and_foreign_names(tokens, tmp_path):
    pq, webdataset = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("webdataset")
    form = SequenceFormat(tokens.grid, tokens.codebook_size, offset=7)
    (file,) = export_parquet(tokens, tmp_path / "p", sequences=form)
    rows = pq.read_table(file).to_pylist()
    assert [row["name"] for row in rows[::2]] == ["a.png", "caf\\udce9.png", "c.png", "d.png"]
    assert [row["class"] for row in rows[:4]] == ["x", "x", "\\udcff", "\\udcff"]
    for number, row in enumerate(rows):
        expected = tokens.tokens([number // 2], number % 2)[0].numpy()
        assert np.array_equal(form.indices(np.array(row["sequence"])), expected)
        assert row["caption"] == tokens.captions[number // 2]
    (file,) = export_webdataset(tokens, tmp_path / "w", sequences=form)
    for number, sample in enumerate(webdataset.WebDataset([str(file)], shardshuffle=False).decode()):
        assert sample["json"]["name"] == tokens.names[number]
        assert sample["txt"] == tokens.captions[number]
        for crop in range(2):
            expected = tokens.tokens([number], crop)[0].numpy()
            assert np.array_equal(form.indices(sample["sequence.npy"][crop]), expected)


def test_a_set_without_captions_is_written_as_before(tmp_path):
    images = ArrayImages(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"])
    encode = lambda images: images[:, 0, ::2, ::2].long() * 0  # noqa: E731
    options = {"grid": (2, 2), "codebook_size": 8, "fingerprint": "abc"}
    written = write_tokens(tmp_path / "t", images, TRANSFORMS["published"](4), encode, **options)
    assert written.captions is None
    assert "captions" not in json.loads((tmp_path / "t" / "shard-00000.json").read_text())
    with pytest.raises(UsageError, match="no captions"):
        export_sequences(written, tmp_path / "s", offset=300, text_ids=lambda text: [1])
