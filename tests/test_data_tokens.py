"""Token data sets: written in shards, resumed, checked, read back."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.data import TRANSFORMS, ArrayImages, open_images
from lexel.data.order import crop_generator
from lexel.data.tokens import TokenSet, export_parquet, export_webdataset, index_dtype, write_tokens
from lexel.data.tokens import write as module
from lexel.errors import UsageError

CROP = TRANSFORMS["published"](4)


def pictures(count: int = 10) -> ArrayImages:
    """Squares after a crop of 4 x 4: column x of picture n is 20 n + x in every channel."""
    array = np.zeros((count, 4, 9, 3), np.uint8)
    array[:] = (20 * np.arange(count))[:, None, None, None] + np.arange(9)[None, None, :, None]
    return ArrayImages(array, [f"{n}.png" for n in range(count)], [n % 3 for n in range(count)], ["a", "b", "c"])


def levels(images: torch.Tensor) -> torch.Tensor:
    """A tokenizer of 256 codes that can be checked by eye: the grey level of every other pixel."""
    return ((images[:, 0, ::2, ::2] + 1) * 127.5).round().long()


def write(folder: Path, images=None, encode=levels, **options):
    options = {"grid": (2, 2), "codebook_size": 256, "fingerprint": "abc", "shard_size": 4, "batch_size": 3} | options
    return write_tokens(folder, pictures() if images is None else images, CROP, encode, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_was_encoded_is_read_back(tmp_path):
    write(tmp_path / "t")
    tokens = TokenSet.open(tmp_path / "t")
    assert len(tokens) == 10
    assert (tokens.grid, tokens.codebook_size, tokens.crops) == ((2, 2), 256, 1)
    assert tokens.names == pictures().names
    assert tokens.labels.tolist() == pictures().labels
    assert tokens.classes == ["a", "b", "c"]
    for number in range(10):  # columns 2 and 4 of the picture: the centred crop begins at (9 - 4) // 2 = 2
        assert tokens.tokens([number]).tolist() == [[[20 * number + 2, 20 * number + 4]] * 2]
    order = [9, 0, 4, 4, 3]
    assert tokens.tokens(order)[:, 0, 0].tolist() == [20 * n + 2 for n in order]
    assert tokens.tokens(order).dtype == torch.int64


@pytest.mark.parametrize(
    "size, dtype", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_indices_take_the_smallest_type_that_holds_them(size, dtype, tmp_path):
    assert index_dtype(size) == dtype
    encode = lambda images: torch.full((len(images), 2, 2), size - 1)  # noqa: E731
    tokens = write(tmp_path / "t", encode=encode, codebook_size=size)
    assert (tokens.tokens(range(10)) == size - 1).all()
    assert np.load(tmp_path / "t" / "shard-00000.npy").dtype == dtype


def test_several_codes_a_place_keep_their_axis(tmp_path):
    encode = lambda images: torch.stack([levels(images), levels(images) + 1, levels(images) + 2], 1)  # noqa: E731
    tokens = write(tmp_path / "t", encode=encode, grid=(3, 2, 2))
    assert tokens.grid == (3, 2, 2)
    assert tokens.tokens([7])[0, :, 0, 0].tolist() == [142, 143, 144]


class Stop(Exception):
    pass


@pytest.mark.parametrize("calls", range(5))
def test_an_interrupted_writer_goes_on_and_writes_the_same_bytes(tmp_path, calls):
    write(tmp_path / "whole", crops=2)
    left = iter(range(calls))

    def fails(images: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise Stop
        return levels(images)

    with pytest.raises(Stop):
        write(tmp_path / "resumed", encode=fails, crops=2)
    with pytest.raises(UsageError, match=r"not finished: \d of 3 shards"):
        TokenSet.open(tmp_path / "resumed")
    seen = []
    write(tmp_path / "resumed", crops=2, encode=lambda images: seen.append(len(images)) or levels(images))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert sum(seen) == 2 * (10 - 4 * (calls // 3))  # a shard takes three calls; whole shards are not encoded again


def test_processes_and_workers_and_batches_change_no_byte(tmp_path):
    write(tmp_path / "one", crops=3)
    assert write(tmp_path / "two", crops=3, rank=1, processes=2) is None
    assert len(write(tmp_path / "two", crops=3, rank=0, processes=2)) == 10
    write(tmp_path / "workers", crops=3, workers=2)
    write(tmp_path / "batches", crops=3, batch_size=7)
    for name in ("two", "workers", "batches"):
        assert contents(tmp_path / name) == contents(tmp_path / "one"), name


def test_writing_again_encodes_nothing(tmp_path):
    write(tmp_path / "t")
    seen = []
    progress = []
    tokens = write(tmp_path / "t", encode=seen.append, progress=lambda done, total: progress.append((done, total)))
    assert (len(tokens), seen, progress[-1]) == (10, [], (10, 10))


@pytest.mark.parametrize("option", [{"fingerprint": "other"}, {"crops": 2}, {"codebook_size": 512}, {"seed": 1}])
@pytest.mark.parametrize("finished", [True, False])
def test_tokens_of_two_kinds_do_not_mix(tmp_path, option, finished):
    write(tmp_path / "t", **({} if finished else {"rank": 1, "processes": 2}))
    with pytest.raises(UsageError, match=f"another way .{next(iter(option))}"):
        write(tmp_path / "t", **option)
    with pytest.raises(UsageError, match="another way"):
        write(tmp_path / "t", images=pictures(9))


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        write(tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_tokenizer_that_breaks_its_word_is_refused(tmp_path):
    with pytest.raises(UsageError, match="for 200 codes"):
        write(tmp_path / "a", images=pictures(12), codebook_size=200)
    with pytest.raises(UsageError, match="for a grid of"):
        write(tmp_path / "b", grid=(4, 4))
    with pytest.raises(UsageError, match="indices from -1"):
        write(tmp_path / "c", encode=lambda images: levels(images) * 0 - 1)


def test_versions_are_centred_first_and_then_random_but_repeatable(tmp_path):
    tokens = write(tmp_path / "t", crops=4, seed=3)
    starts = np.array([[tokens.tokens([n], crop)[0, 0, 0].item() - 20 * n for crop in range(4)] for n in range(10)])
    assert (starts[:, 0] == 2).all()
    assert set(starts[:, 1:].ravel()) == {0, 1, 2, 3, 4, 5}
    expected = CROP(pictures().read(6), crop_generator(3, 2, 6))[0, 0, 0] - 120
    assert starts[6, 2] == expected


def test_unreadable_pictures_are_left_out_and_named(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    for number in (0, 4, 5):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"")
    tokens = write(tmp_path / "t", images=open_images(tmp_path / "images"), shard_size=2, batch_size=2)
    assert tokens.names == ["1.png", "2.png", "3.png"]
    assert tokens.labels is None
    assert tokens.tokens(range(3))[:, 0, 0].tolist() == [1, 2, 3]
    assert tokens.unreadable.keys() == {"0.png", "4.png", "5.png"}  # the last shard is empty


@pytest.mark.parametrize("processes", [1, 2])
def test_more_unreadable_pictures_than_are_allowed_end_the_work_which_may_go_on(tmp_path, processes):
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    for number in (0, 4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"")
    images, options = open_images(tmp_path / "images"), {"shard_size": 2, "processes": processes}
    allowed = 0.24 * processes  # of this process's pictures: 2 of 8, or 2 of 4
    for _ in range(2):  # again: the shard that was written counts too
        with pytest.raises(
            UsageError, match=rf"2 of {8 // processes} images cannot be read, more than .*; the first, 0"
        ):
            write(tmp_path / "t", images, max_unreadable=allowed, **options)
    assert not (tmp_path / "t" / "tokens.json").exists()
    for rank in range(processes):
        tokens = write(tmp_path / "t", images, max_unreadable=0.5, rank=rank, **options)
    write(tmp_path / "whole", images, shard_size=2)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    assert tokens.unreadable.keys() == {"0.png", "4.png"}


def test_another_tokenizer_is_refused(tmp_path):
    tokens = write(tmp_path / "t")
    tokens.require("abc")
    with pytest.raises(UsageError, match="another tokenizer"):
        tokens.require("abd")


def test_damaged_folders_are_named(tmp_path):
    def spoil(name: str, change) -> Path:
        write(tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def cut(folder: Path) -> None:
        path = folder / "shard-00001.npy"
        path.write_bytes(path.read_bytes()[:-1])

    def other_version(folder: Path) -> None:
        facts = json.loads((folder / "tokens.json").read_text())
        del facts["checksum"]
        (folder / "tokens.json").write_text(json.dumps(facts | {"version": 99}))

    cases = {
        "shard-00001.npy has": cut,
        "shard-00002.npy is missing": lambda folder: (folder / "shard-00002.npy").unlink(),
        "shard-00000.json is missing": lambda folder: (folder / "shard-00000.json").unlink(),
        "not valid JSON": lambda folder: (folder / "shard-00000.json").write_text("{"),
        "does not describe": lambda folder: (folder / "tokens.json").write_text('{"a": 1}'),
        "version 99": other_version,
        "holds no tokens": lambda folder: (folder / "tokens.json").unlink(),
    }
    for number, (words, change) in enumerate(cases.items()):
        with pytest.raises(UsageError, match=words):
            TokenSet.open(spoil(f"t{number}", change))
    with pytest.raises(UsageError, match="no folder"):
        TokenSet.open(tmp_path / "nowhere")


def test_a_changed_byte_is_found(tmp_path):
    write(tmp_path / "t")
    path = tmp_path / "t" / "shard-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    tokens = TokenSet.open(tmp_path / "t")
    tokens.tokens([0, 9])  # shards 0 and 2
    with pytest.raises(UsageError, match=r"shard-00001.npy is damaged"):
        tokens.tokens([4])
    with pytest.raises(UsageError, match="checksum"):
        TokenSet.open(tmp_path / "t", verify="now")
    TokenSet.open(tmp_path / "t", verify="never").tokens([4])


def test_the_histogram_counts_every_version(tmp_path):
    tokens = write(tmp_path / "t", crops=2)
    histogram = tokens.histogram()
    assert histogram.shape == (256,)
    assert histogram.sum() == 10 * 2 * 4
    everything = np.concatenate([np.load(path).ravel() for path in sorted((tmp_path / "t").glob("*.npy"))])
    assert torch.equal(histogram, torch.bincount(torch.from_numpy(everything.astype(np.int64)), minlength=256))


def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def test_token_batches_are_a_function_of_seed_and_step(tmp_path):
    tokens = write(tmp_path / "t", crops=3)
    whole = take(tokens.training_batches(4, seed=1), 12)
    assert sorted(torch.cat([batch.numbers for batch in whole[:5]]).tolist()) == sorted([*range(10)] * 2)
    for step, batch in enumerate(take(tokens.training_batches(4, seed=1, first_step=5), 7), start=5):
        assert torch.equal(batch.indices, whole[step].indices)
        assert torch.equal(batch.labels, whole[step].labels)
    parts = [take(tokens.training_batches(4, seed=1, rank=rank, processes=2), 12) for rank in range(2)]
    for step in range(12):
        assert torch.equal(torch.cat([part[step].indices for part in parts]), whole[step].indices)
    for batch in whole:
        assert torch.equal(batch.labels, batch.numbers % 3)
        assert ((batch.indices[:, 0, 0] - 20 * batch.numbers).abs() <= 5).all()
    versions = {
        (int(number), int(row))
        for batch in whole
        for number, row in zip(batch.numbers, batch.indices[:, 0, 0], strict=True)
    }
    assert len(versions) > 15  # the versions take turns
    with pytest.raises(UsageError, match="evenly"):
        tokens.training_batches(5, seed=0, processes=2)


def test_ordered_token_batches_show_every_image_once(tmp_path):
    tokens = write(tmp_path / "t")
    seen = [
        number for rank in range(3) for batch in tokens.ordered_batches(2, rank, 3) for number in batch.numbers.tolist()
    ]
    assert sorted(seen) == list(range(10))


def test_parts_of_a_set_are_sets(tmp_path):
    tokens = write(tmp_path / "t", crops=2)
    rest, held = tokens.hold_out(0.3)
    assert (len(rest), len(held)) == (7, 3)
    assert sorted(rest.names + held.names) == tokens.names
    for part in (rest, held.subset([2, 0])):
        for number, name in enumerate(part.names):
            original = tokens.names.index(name)
            assert torch.equal(part.tokens([number], 1), tokens.tokens([original], 1))
            assert part.labels[number] == tokens.labels[original]
    assert torch.equal(rest.histogram() + held.histogram(), tokens.histogram())


def test_a_set_travels_to_other_processes_without_its_tokens(tmp_path):
    tokens = write(tmp_path / "t")
    tokens.tokens([0])
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy._shards == {}
    assert torch.equal(copy.tokens([3]), tokens.tokens([3]))


def test_parquet_holds_the_same(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    tokens = write(tmp_path / "t", crops=2)
    files = export_parquet(tokens, tmp_path / "parquet", rows=8)
    assert len(files) == 3
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 20
    for row in rows:
        number = tokens.names.index(row["name"])
        assert row["indices"] == tokens.tokens([number], row["crop"]).flatten().tolist()
        assert (row["label"], row["class"]) == (number % 3, "abc"[number % 3])
    facts = json.loads(pq.read_schema(files[0]).metadata[b"lexel"])
    assert (facts["grid"], facts["codebook_size"], facts["fingerprint"]) == ([2, 2], 256, "abc")
    assert str(pq.read_schema(files[0]).field("indices").type.value_type) == "uint8"
    with pytest.raises(UsageError, match="not empty"):
        export_parquet(tokens, tmp_path / "parquet")


def test_webdataset_holds_the_same(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    tokens = write(tmp_path / "t", crops=2)
    files = export_webdataset(tokens, tmp_path / "tars", rows=4)
    assert len(files) == 3
    dataset = webdataset.WebDataset([str(path) for path in files], shardshuffle=False).decode()
    samples = list(dataset)
    assert [sample["json"]["name"] for sample in samples] == tokens.names
    for number, sample in enumerate(samples):
        assert np.array_equal(sample["indices.npy"][1], tokens.tokens([number], 1)[0])
        assert (sample["cls"], sample["json"]["class"]) == (number % 3, "abc"[number % 3])


@pytest.mark.parametrize("export, package", [(export_parquet, "pyarrow"), (export_webdataset, "webdataset")])
def test_an_export_without_its_package_says_what_to_install(tmp_path, monkeypatch, export, package):
    tokens = write(tmp_path / "t")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError, match="pip install"):
        export(tokens, tmp_path / "out")


def test_a_killed_writer_leaves_only_whole_files(tmp_path, monkeypatch):
    """A crash between a shard and its description: the shard is written again, and nothing half-written is believed."""
    original = module.atomic_write

    def dies(path: Path):
        if path.name == "shard-00001.json":
            raise Stop
        return original(path)

    monkeypatch.setattr(module, "atomic_write", dies)
    with pytest.raises(Stop):
        write(tmp_path / "t")
    monkeypatch.undo()
    assert (tmp_path / "t" / "shard-00001.npy").is_file()
    (tmp_path / "t" / ".partial-0123-shard-00001.npy").write_bytes(b"what kill -9 leaves")
    with pytest.raises(UsageError, match="1 of 3 shards"):
        TokenSet.open(tmp_path / "t")
    assert torch.equal(write(tmp_path / "t").tokens(range(10)), write(tmp_path / "whole").tokens(range(10)))
