"""Sequences for language models: the convention, known by hand, and the way back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
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
from lexel.token_spec import TokenSpec

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


@pytest.fixture
def own_sizes(tmp_path: Path) -> TokenSet:
    """Three images in their own sizes, with captions."""
    array = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), np.uint8)
    images = ArrayImages(array, ["a.png", "b.png", "c.png"])
    images.read = lambda number: array[0, : 2 + number, : 6 - 2 * number]
    images.captions = ["one", "two", "three"]
    encode = lambda images: ((images[:, 0] + 1) * 127.5).round().long()  # noqa: E731
    layout = lambda height, width: TokenSpec(((height, width),), 256)  # noqa: E731
    options = {"grid": None, "codebook_size": 256, "fingerprint": "abc", "shard_size": 2, "layout": layout}
    return write_tokens(tmp_path / "o", images, None, encode, **options)


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


def test_rows_and_columns_stand_before_the_codes_and_formats_of_one_vocabulary_tell_each_other(tmp_path):
    form = SequenceFormat((2, 3), codebook_size=10, offset=100, sides=4)
    assert form.vocabulary_size == 113 + 8
    sequence = form.ids(np.zeros((1, 2, 3), np.int64))[0]
    assert sequence[:4].tolist() == [111, 114, 119, 100]  # begin, two rows, three columns, the first code
    other = SequenceFormat((4, 1), codebook_size=10, offset=100, sides=4)
    assert other.size_of(np.concatenate([[5, 6], sequence])) == (2, 3)
    assert form.size_of(other.ids(np.zeros((1, 4, 1), np.int64))[0]) == (4, 1)
    with pytest.raises(UsageError, match="no sequence of a 4x1 grid"):
        other.indices(sequence)
    with pytest.raises(UsageError, match="does not say its rows and columns"):
        form.size_of(np.array([111, 100, 100]))
    for grid in ((5,), (2, 5)):
        with pytest.raises(UsageError, match="sides = 4 must be 0 or at least"):
            SequenceFormat(grid, 10, sides=4)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("sides", [0, 6])
def test_every_format_is_read_back_exactly(grid, rows, ends, sides):
    form = SequenceFormat(grid, 50, 1000, rows, ends, sides if len(grid) > 1 else 0)
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
    sequences = export_sequences(tokens, tmp_path / "s", offset=300, text_ids=words, sides=2)
    again = SequenceSet(tmp_path / "s")
    assert len(again) == len(sequences) == 8
    for number in range(8):
        image, crop = divmod(number, 2)
        assert np.array_equal(again.indices(number), tokens.tokens([image], crop)[0].numpy())
        caption = words(tokens.captions[image])
        assert again[number][: len(caption)].tolist() == caption
        assert again[number][len(caption)] == again.format.begin
    assert (again.names, again.labels) == (list(tokens.names), [0, 1, 0, 1])
    assert again.captions == list(tokens.captions)
    assert np.fromfile(tmp_path / "s" / "tokens.bin", "<u2").tolist() == np.asarray(again.ids).tolist()
    with pytest.raises(UsageError, match="raise offset"):
        export_sequences(tokens, tmp_path / "u", offset=100, text_ids=words)
    with pytest.raises(UsageError, match="not empty"):
        export_sequences(tokens, tmp_path / "s")


def test_images_in_their_own_sizes_say_them_after_their_captions(own_sizes, tmp_path):
    words = lambda text: list(text.encode())  # noqa: E731
    for ends in (True, False):
        sequences = export_sequences(own_sizes, tmp_path / f"{ends}", offset=300, text_ids=words, ends=ends)
        for number, sides in enumerate([(2, 6), (3, 4), (4, 2)]):
            ids = sequences[number].tolist()
            caption = words(own_sizes.captions[number])
            assert ids[: len(caption)] == caption
            first = len(caption) + ends
            assert tuple(ids[first : first + 2]) == (558 + sides[0], 558 + 6 + sides[1])  # 300 + 256 + 2 is the end
            assert np.array_equal(sequences.indices(number), own_sizes.tokens([number])[0].numpy())
            assert sequences.format_of(number).grid == sides


@pytest.mark.parametrize("name", ["sequences.json", "tokens.index.npy", "tokens.bin"])
@counts
@pytest.mark.parametrize("layout", ["tokens", "own_sizes"])
def test_damaged_sequences_are_refused_in_one_line(request, tmp_path, name, layout, count):
    export_sequences(request.getfixturevalue(layout), tmp_path / "s")

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


@pytest.mark.slow
def test_a_causal_language_model_learns_exported_sequences_and_writes_images_that_are_read_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    greys = np.repeat(rng.integers(0, 256, 96), 12 * 3).reshape(96, 2, 6, 3).astype(np.uint8)
    images = ArrayImages(greys, [f"{number}.png" for number in range(96)])

    def encode(images):  # the first code says how grey; each next one is the one before plus 3, modulo 12
        first = ((images.mean((1, 2, 3)) + 1) * 6).long().clamp(0, 11)
        return ((first[:, None] + 3 * torch.arange(6)) % 12).view(-1, 2, 3)

    options = {"grid": (2, 3), "codebook_size": 12, "fingerprint": "abc"}
    written = write_tokens(tmp_path / "t", images, TRANSFORMS["stretch"](4), encode, **options)
    sequences = export_sequences(written, tmp_path / "s", sides=3)
    form = sequences.format
    rows = torch.from_numpy(np.stack([sequences[number] for number in range(96)]).astype(np.int64))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=form.vocabulary_size, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=form.begin, eos_token_id=form.end,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(120):
        loss = model(input_ids=rows[step % 3 :: 3], labels=rows[step % 3 :: 3]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5  # ln(21) is 3.0
    assert losses[-1] < 0.35  # only the first code is not decided by what comes before: ln(12) / 11 = 0.23
    start = torch.tensor([[form.begin]]).expand(8, 1)
    made = model.eval().generate(start, attention_mask=torch.ones_like(start), max_length=form.length, do_sample=True)
    for sequence in made.numpy():
        assert form.size_of(sequence) == (2, 3)
        codes = form.indices(sequence).flatten()
        assert ((codes[1:] - codes[:-1]) % 12 == 3).all()
