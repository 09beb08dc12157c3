"""Streams of the `datasets` library: numbered as they are read, read once by whatever goes through them in order."""

import os
import sys
import types
from itertools import islice

import numpy as np
import pytest
import torch
from test_data_sources import CAPTIONS, COUNT, LABELS, PIXELS, png
from test_data_tokens import contents

from lexel.data import TRANSFORMS, open_images, ordered_batches, training_batches
from lexel.data.config import DataConfig, open_data
from lexel.data.tokens import TokenSet, write_tokens
from lexel.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*is read as a stream")


class Names:
    names = ("x", "y", "z")


class Stream:
    """What is used of `datasets.IterableDataset`; images are counted as they are read."""

    column_names = ("img", "label", "text")
    features = types.MappingProxyType({"label": Names()})
    info, split = types.SimpleNamespace(splits=None), "train"
    read, broken, length = 0, None, COUNT  # images read in this process; the one at which it breaks; how many there are

    def __init__(self, columns=column_names, first=0):
        self.columns, self.first = columns, first

    def select_columns(self, columns):
        return Stream(columns, self.first)

    def cast_column(self, column, feature):
        assert (column, feature) == ("img", "undecoded")
        return self

    def skip(self, count):
        return Stream(self.columns, self.first + count)

    def iter(self, batch_size):
        process = os.getpid()
        for number in range(self.first, Stream.length):
            assert process == os.getpid(), "a connection of another process"
            if number == Stream.broken and "img" in self.columns:
                raise RuntimeError("no\nnetwork")
            Stream.read += "img" in self.columns
            row = {"img": {"bytes": png(number), "path": None}, "label": LABELS[number], "text": CAPTIONS[number]}
            yield {column: [row[column]] for column in self.columns}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """A library of one data set, with the splits train and test; the test split is the same stream."""

    def load_dataset(name, config, streaming, **version):
        assert (name, config, streaming, version) == ("me/words", None, True, {})
        return {"train": Stream(), "test": Stream()}

    module = types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: "decoded" if decode else "undecoded")
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name, value in (("read", 0), ("broken", None), ("length", COUNT)):
        monkeypatch.setattr(Stream, name, value)


def opened(query=""):
    return open_images(f"datasets:me/words?streaming=true{query}")


def batches(images, first=0, count=9, seed=3, **options):
    made = training_batches(images, TRANSFORMS["crop"](8), 4, seed, first, **options)
    return [(batch.numbers.tolist(), batch.labels.tolist(), batch.images) for batch in islice(made, count)]


def same(first, second):
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))


def test_images_have_the_numbers_labels_and_captions_of_the_streams_order():
    images = opened()
    assert (images.names[3], images.labels, images.classes) == ("03", LABELS, ["x", "y", "z"])
    assert images.captions == CAPTIONS
    for number in (0, 5, 2, COUNT - 1, 0):  # forwards, and back to the beginning
        assert np.array_equal(images.read(number), PIXELS[number])


@pytest.mark.parametrize("workers", [0, 2])
def test_going_through_in_order_gives_each_image_once(workers):
    images = opened("&window=1")
    images.read(0)  # so that the stream is open when workers are forked
    batches = ordered_batches(images, None, 1, workers=workers)
    assert [number for batch in batches for number in batch.numbers.tolist()] == list(range(COUNT))
    assert Stream.read == (1 if workers else COUNT)  # of this process: once, none twice


def test_a_batch_is_a_function_of_seed_and_step_whoever_reads_it():
    whole = batches(opened("&window=5"))
    assert same(batches(opened("&window=5"), workers=2), whole)
    for first in (1, 4, 7):
        assert same(batches(opened("&window=5"), first, 9 - first), whole[first:])
    halves = [batches(opened("&window=5"), rank=rank, processes=2) for rank in range(2)]
    assert [a[0] + b[0] for a, b in zip(*halves, strict=True)] == [batch[0] for batch in whole]
    assert not same(batches(opened("&window=5"), seed=4), whole)


def test_an_epoch_is_shuffled_within_windows_and_reads_the_stream_once():
    order = [number for batch in batches(opened("&window=5"), count=COUNT // 4) for number in batch[0]]
    assert order != sorted(order)
    windows = [order[:5], order[5:10], order[10:]]
    assert [sorted(window) for window in windows] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert Stream.read == COUNT


def test_what_is_held_out_is_the_streams_beginning_and_is_read_by_itself():
    training, held = open_data(
        DataConfig(source="datasets:me/words?streaming=true&window=4", size=8, validation=0.25, memory=0)
    )
    assert [len(training), len(held)] == [9, 3]
    for number in range(9):  # validated after every image
        assert np.array_equal(training.read(number), PIXELS[3 + number])
        assert np.array_equal(held.read(number % 3), PIXELS[number % 3])
    assert Stream.read == COUNT + 3
    assert same(batches(training, 2, 3), batches(training, 0, 5)[2:])


def mean(images):
    """Indices (B, 2, 2) that tell pictures apart."""
    return ((torch.nn.functional.adaptive_avg_pool2d(images, 2).mean(1) + 1) * 127).long()


def written(folder, rank=0, processes=1, encode=mean):
    return write_tokens(
        folder,
        opened(),
        TRANSFORMS["crop"](8),
        encode,
        grid=(2, 2),
        codebook_size=256,
        fingerprint="abc",
        batch_size=2,
        shard_size=3,
        rank=rank,
        processes=processes,
    )


def test_parts_and_a_stream_that_broke_give_the_tokens_of_one_run(tmp_path):
    tokens = written(tmp_path / "one")
    assert (tokens.labels.tolist(), list(tokens.captions)) == (LABELS, CAPTIONS)
    Stream.broken = 7
    images = opened()
    for _ in range(2):
        with pytest.raises(UsageError, match=r"^the stream of me/words broke after image 7: no network$"):
            images.read(9)
    with pytest.raises(UsageError, match="broke after image 7"):
        written(tmp_path / "parts", 0, 2)
    Stream.broken = None
    assert np.array_equal(images.read(9), PIXELS[9])
    assert written(tmp_path / "parts", 0, 2) is None
    written(tmp_path / "parts", 1, 2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert TokenSet.open(tmp_path / "one").unreadable == {}


def test_a_stream_that_became_shorter_is_told():
    images = opened()
    Stream.length = 7
    with pytest.raises(UsageError, match=r"^the stream of me/words ended after 7 images of 12$"):
        images.read(9)


def test_a_stream_that_says_its_number_or_is_cut_is_not_gone_through(monkeypatch):
    monkeypatch.setattr(Stream, "column_names", ("img",))
    assert len(opened()) == Stream.read == COUNT  # counted
    assert len(opened("&count=5")) == 5
    splits = {"train": types.SimpleNamespace(num_examples=COUNT)}
    monkeypatch.setattr(Stream, "info", types.SimpleNamespace(splits=splits))
    assert (len(opened()), Stream.read) == (COUNT, COUNT)


def test_what_a_stream_loses_is_said():
    with pytest.warns(UserWarning, match="only within 1,024 neighbours, and every worker, process and part reads past"):
        opened()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("datasets:me/words?streaming=yes", "streaming must be true or false, got 'yes'"),
        ("datasets:me/words?streaming=true&count=0", "count must be a whole number from 1, got '0'"),
        ("datasets:me/words?streaming=true&count=13", "has 12 images, fewer than count=13"),
        ("datasets:me/words?streaming=true&window=a", "window must be a whole number from 1, got 'a'"),
        ("datasets:me/words?window=9", "window is of streams, and this is none; add streaming=true"),
        ("datasets:me/words?streaming=true&image=picture", "no column 'picture'; its columns are img, label, text"),
        ("datasets:me/words?streaming=true&label=text", "'text' must hold class numbers from 0"),
        ("datasets:me/words?streaming=true&caption=label", "'label' must hold a text for every image"),
        ("datasets:me/words?streaming=true&windows=9", "takes no 'windows' after its [?]; choose from config,"),
        ("datasets:me/words?streaming=true&split=", "split has no value"),
        ("datasets:me/words?streaming=true&split=a&split=b", "a key is given twice"),
        ("datasets:me/words?streaming=true&split=none", "no split 'none'; its splits are train, test"),
        ("mixture:datasets:me/words?streaming=true + photos", "a stream is read forwards and cannot be mixed"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(source, words):
    with pytest.raises(UsageError, match=words) as error:
        open_images(source)
    assert "\n" not in str(error.value)
