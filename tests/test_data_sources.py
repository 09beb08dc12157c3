"""Sources of every kind: the same pictures, whatever they lie in, read by number, resumable at any step."""

import functools
import gzip
import http.server
import io
import itertools
import json
import pickle
import tarfile
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from PIL import Image

from lexel.data import (
    SOURCES,
    TRANSFORMS,
    NoSplit,
    UnreadableImage,
    open_images,
    ordered_batches,
    remote,
    training_batches,
)
from lexel.data import tar as tar_module
from lexel.data.array_files import read_idx
from lexel.data.config import DataConfig, open_data
from lexel.errors import UsageError

COUNT = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 9, 3), np.uint8)
LABELS = [number % 3 for number in range(COUNT)]
CAPTIONS = [f"picture {number}, ä" for number in range(COUNT)]
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "photographs-80.tar"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def as_tar(folder: Path) -> str:
    """Three shards of WebDataset's naming: labels in .cls, captions in .txt, one sample's both in .json."""
    for shard in range(3):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as archive:
            for number in range(4 * shard, 4 * shard + 4):
                if number == 5:
                    add(archive, f"{number:03d}.json", json.dumps({"label": 2, "caption": CAPTIONS[5]}).encode())
                else:
                    add(archive, f"{number:03d}.cls", str(LABELS[number]).encode())
                    add(archive, f"{number:03d}.txt", CAPTIONS[number].encode())
                add(archive, f"{number:03d}.png", png(number))
    return f"tar:{folder}/{{00..02}}.tar"


def as_npz(folder: Path) -> str:
    np.savez(folder / "a.npz", images=PIXELS, labels=np.array(LABELS), captions=np.array(CAPTIONS))
    return f"npz:{folder / 'a.npz'}"


def as_compressed_npz(folder: Path) -> str:
    np.savez_compressed(folder / "a.npz", images=PIXELS, labels=np.array(LABELS), captions=np.array(CAPTIONS))
    return f"npz:{folder / 'a.npz'}"


def as_list(folder: Path) -> str:
    rows = ["path,label,caption"]
    for number in range(COUNT):
        (folder / f"{number:02d}.png").write_bytes(png(number))
        rows.append(f'{number:02d}.png,{LABELS[number]},"{CAPTIONS[number]}"')
    (folder / "list.csv").write_text("\n".join(rows), encoding="utf-8")
    return f"list:{folder / 'list.csv'}"


def as_parquet(folder: Path) -> str:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": png(number), "path": None} for number in range(COUNT)]
    table = pa.table({"image": images, "label": LABELS, "text": CAPTIONS})
    pq.write_table(table.slice(0, 7), folder / "0.parquet", row_group_size=3)
    pq.write_table(table.slice(7), folder / "1.parquet", row_group_size=3)
    return f"parquet:{folder}/*.parquet"


KINDS = {
    "tar": as_tar,
    "npz": as_npz,
    "compressed npz": as_compressed_npz,
    "list": as_list,
    "parquet": as_parquet,
}


@pytest.fixture(params=KINDS)
def source(request, tmp_path) -> str:
    (tmp_path / "set").mkdir()
    return KINDS[request.param](tmp_path / "set")


def test_pictures_labels_and_captions_are_those_that_were_written(source):
    images = open_images(source)
    assert len(images) == len(set(images.names)) == COUNT
    for number in range(COUNT):
        assert np.array_equal(images.read(number), PIXELS[number])
    assert images.labels == LABELS
    assert images.classes == ["0", "1", "2"]
    assert list(images.captions) == CAPTIONS
    part = images.subset([7, 1])
    assert (list(part.captions), part.labels) == ([CAPTIONS[7], CAPTIONS[1]], [1, 1])
    with pytest.raises(NoSplit):
        open_images(source, "validation")


def test_batches_are_a_function_of_seed_and_step_with_any_workers(source):
    images, transform = open_images(source), TRANSFORMS["published"](8)
    whole = list(itertools.islice(training_batches(images, transform, 4, seed=3), 9))
    later = itertools.islice(training_batches(open_images(source), transform, 4, seed=3, first_step=4, workers=2), 5)
    for ours, batch in zip(whole[4:], later, strict=True):
        assert torch.equal(ours.images, batch.images)
        assert torch.equal(ours.labels, batch.labels)


def test_a_set_travels_to_another_process_and_knows_itself(source):
    images = open_images(source)
    images.read(0)
    copy = pickle.loads(pickle.dumps(images))
    assert np.array_equal(copy.read(5), PIXELS[5])
    assert copy.fingerprint() == images.fingerprint() == open_images(source).fingerprint()


def test_a_recipes_section_opens_it(source):
    training, measuring = open_data(DataConfig(source=source, size=8))
    assert (len(training), len(measuring)) == (COUNT - 1, 1)


@pytest.mark.parametrize("channels, depth", [(1, 8), (4, 8), (3, 16), (1, 16)])
def test_every_source_gives_the_channels_and_bits_that_are_asked_for(source, channels, depth):
    images = open_images(source, channels=channels, depth=depth)
    assert (images.channels, images.depth) == (channels, depth)
    array = images.read(3)
    assert array.shape == (8, 9, channels)
    assert array.dtype == {8: np.uint8, 16: np.uint16}[depth]


def test_the_table_has_every_kind_and_unknown_ones_are_refused_with_the_names(tmp_path):
    kinds = "folder file npz idx tar parquet datasets list mixture openmoji photos photo-crops"
    assert set(kinds.split()) <= SOURCES.keys()
    with pytest.raises(UsageError, match=r"unknown source 'zip'; choose from .*tar"):
        open_images("zip:a.zip")
    np.savez(tmp_path / "a.npz", images=PIXELS)
    with pytest.raises(UsageError, match="write npz:"):
        open_images(tmp_path / "a.npz")


def test_another_package_adds_a_source_by_an_entry_point(monkeypatch):
    class Point:
        name, value, group = "mine", "package:function", "lexel.sources"

        def load(self):
            return lambda location, options: ("opened", location, options.split)

    monkeypatch.setattr("lexel.registry.entry_points", lambda group: [Point()] if group == "lexel.sources" else [])
    assert open_images("mine:a/b", "train") == ("opened", "a/b", "train")


# Tar shards


def test_the_index_is_made_once_and_checked_against_the_shards(tmp_path, monkeypatch):
    source, made = as_tar(tmp_path), []
    index = tar_module.index_shard
    monkeypatch.setattr(tar_module, "index_shard", lambda path: made.append(path.name) or index(path))
    first = open_images(source)
    assert sorted(made) == ["00.tar", "01.tar", "02.tar"]
    second = open_images(source)
    assert sorted(made) == ["00.tar", "01.tar", "02.tar"]
    assert (second.names, second.labels, list(second.captions)) == (first.names, first.labels, list(first.captions))
    with tarfile.open(tmp_path / "01.tar", "a") as archive:
        add(archive, "900.png", png(0))
        add(archive, "900.cls", b"1")
    assert len(open_images(source)) == COUNT + 1
    assert made[3:] == ["01.tar"]
    with pytest.raises(UnreadableImage, match="changed after it was opened"):
        first.read(4)
    assert np.array_equal(first.read(0), PIXELS[0])


def test_the_indexes_of_several_shards_are_made_at_the_same_time(tmp_path, monkeypatch):
    source, index, told = as_tar(tmp_path), tar_module.index_shard, []
    together = threading.Barrier(3, timeout=5)  # broken, an error, where they come one after the other
    monkeypatch.setattr(tar_module, "index_shard", lambda path: together.wait() * 0 or index(path))
    assert len(open_images(source, progress=lambda *now: told.append(now))) == COUNT
    assert told == [(1, 3), (2, 3), (3, 3)]


@counts
def test_a_damaged_index_is_made_again(tmp_path, count):
    source = as_tar(tmp_path)
    first = open_images(source)

    def is_the_same(images):
        assert (list(images.names), images.fingerprint()) == (list(first.names), first.fingerprint())
        assert np.array_equal(images.read(COUNT - 1), first.read(COUNT - 1))

    for path in sorted((tmp_path / "cache" / "indexes").iterdir())[:1]:
        survives(lambda _: open_images(source), path, 8, count, is_the_same, always=True, name="index.npz")


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(open_images(as_tar(tmp_path))) == COUNT


def test_a_shard_that_is_cut_short_is_named_and_read_as_far_as_it_goes(tmp_path):
    source = as_tar(tmp_path)
    path = tmp_path / "01.tar"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.warns(UserWarning, match=r"1 of 3 shards are damaged and were read in part; .*01.tar"):
        images = open_images(source)
    assert 8 < len(images) < COUNT
    assert list(images.left_out) == [str(path)]
    for number in range(len(images)):
        assert images.read(number).shape == (8, 9, 3)
    with pytest.raises(UsageError, match=r"1 of 3 shards are damaged, more than max_unreadable = 0.2"):
        open_data(DataConfig(source=source, size=8, max_unreadable=0.2))


@pytest.mark.parametrize("place", [1, 130, 150], ids=["name", "size", "checksum"])
def test_a_header_in_which_a_bit_has_changed_does_not_end_the_shard_silently(tmp_path, place):
    source = as_tar(tmp_path)
    path = tmp_path / "01.tar"
    with tarfile.open(path) as archive:
        second = [member.offset for member in archive if member.name.endswith(".png")][1]
    data = bytearray(path.read_bytes())
    data[second + place] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"1 of 3 shards are damaged and were read in part; .*01.tar: .* is none"):
        images = open_images(source)
    assert len(images) == COUNT - 3


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_pythons_own_module_reads_them(tmp_path, form):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        for number, name in enumerate(["a.png", f"{'b' * 90}/{'c' * 90}.png", "ä.png", "x" * 99, "y" * 100]):
            add(archive, name, b"z" * (number * 300))
        folder = tarfile.TarInfo("folder.png/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = [(one.name, one.offset_data, one.size) for one in archive if one.isreg()]
    with (tmp_path / "a.tar").open("rb") as file:
        assert [(one.name, one.offset_data, one.size) for one in tar_module._members(file)] == expected
    assert len(expected) == 5


def test_the_folders_of_an_archive_are_splits_and_classes(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, name in enumerate(["train/cat/0.png", "train/dog/1.png", "validation/dog/2.png", "._x.png"]):
            add(archive, f"./{name}", png(number))
    source = f"tar:{tmp_path / 'a.tar'}"
    training, measuring = open_data(DataConfig(source=source, size=8))
    assert (training.names, training.labels, training.classes) == (["cat/0.png", "dog/1.png"], [0, 1], ["cat", "dog"])
    assert (measuring.names, measuring.classes) == (["dog/2.png"], ["dog"])
    assert len(open_images(source)) == 3


def test_keys_that_begin_anew_in_every_shard_stay_apart(tmp_path):
    for shard in "ab":
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            add(archive, "0.png", png("ab".index(shard)))
    images = open_images(f"tar:{tmp_path}/{{a,b}}.tar")
    assert images.names == ["a/0.png", "b/0.png"]
    assert np.array_equal(images.read(1), PIXELS[1])


def test_shards_that_cannot_be_read_by_number_are_refused(tmp_path):
    as_tar(tmp_path)
    (tmp_path / "00.tar").write_bytes(gzip.compress((tmp_path / "00.tar").read_bytes()))
    with pytest.raises(UsageError, match="compressed"):
        open_images(f"tar:{tmp_path}/00.tar")
    with pytest.raises(UsageError, match=r"no file .*03.tar"):
        open_images(f"tar:{tmp_path}/{{01..07}}.tar")


@counts
def test_a_mutated_shard_is_read_in_part_or_refused_in_one_line(tmp_path, count):
    as_tar(tmp_path)
    (tmp_path / "cache").write_text("no folder: nothing is kept")

    @pytest.mark.filterwarnings("ignore")
    def read(path: Path) -> list:
        images = open_images(f"tar:{path}")
        for number in range(len(images)):
            try:
                images.read(number)
            except UnreadableImage:
                continue
        return images

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        survives(read, tmp_path / "00.tar", seed=8, count=count)


@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason="the photographs are not here")
def test_a_real_archive_of_photographs_is_read(tmp_path):
    training, measuring = open_data(DataConfig(source=f"tar:{PHOTOGRAPHS}", size=64, memory=0))
    assert (len(training), len(measuring), len(training.classes)) == (6345, 2857, 91)
    assert min(training.read(number).shape[:2][0] for number in range(0, 6345, 500)) >= 80
    assert measuring.with_classes(training.classes).labels is not None


# Arrays


# ------------------------------------------------------------------------------------------------- elsewhere


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, also by ranges of bytes; `failures` requests are answered with 503 first."""

    failures: typing.ClassVar[list[int]] = []
    asked: typing.ClassVar[list[str]] = []

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        self.asked.append(self.headers.get("Range", ""))
        if self.failures or not path.is_file():
            self.send_error(self.failures.pop() if self.failures else 404)
            return
        if "Range" not in self.headers:
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.01)
    handler = functools.partial(Ranges, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        Ranges.asked.clear()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_shards_behind_http_are_read_by_ranges_and_are_those_of_the_disk(tmp_path, server):
    as_tar(tmp_path)
    here, there = open_images(f"tar:{tmp_path}/{{00..02}}.tar"), open_images(f"tar:{server}/{{00..02}}.tar")
    assert (there.names, there.labels, there.captions) == (here.names, here.labels, here.captions)
    assert Ranges.asked.count("bytes=0-0") == 2 * 3  # the size: for the version, and to open the file
    Ranges.asked.clear()
    Ranges.failures[:] = [503]  # what passes is tried again
    for number in (11, 0):
        assert np.array_equal(there.read(number), here.read(number))
    assert len(Ranges.asked) == 3
    assert np.array_equal(pickle.loads(pickle.dumps(there)).read(5), here.read(5))
    Ranges.asked.clear()
    assert open_images(f"tar:{server}/{{00..02}}.tar").names == here.names
    assert Ranges.asked == ["bytes=0-0"] * 3  # the index is kept
    Ranges.failures[:] = [503] * 3
    with pytest.raises(UnreadableImage, match="the server answers 503"):
        there.read(3)
    (tmp_path / "00.tar").write_bytes((tmp_path / "00.tar").read_bytes()[:-1] + b"!")
    with pytest.raises(UnreadableImage, match="was changed after it was opened"):
        there.read(0)
    with pytest.raises(UsageError, match=r"missing\.tar cannot be read: the server answers 404"):
        open_images(f"tar:{server}/missing.tar")


def test_shards_in_any_store_of_fsspec_are_read(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    as_tar(tmp_path)
    here = open_images(f"tar:{tmp_path}")
    store = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        store.pipe_file(f"/shards/{path.name}", path.read_bytes())
    there = open_images("tar:memory://shards/*.tar")
    assert (there.names, there.labels, there.captions) == (here.names, here.labels, here.captions)
    assert all(np.array_equal(there.read(number), here.read(number)) for number in range(COUNT))
    with pytest.raises(UsageError, match="nothing in the store matches"):
        open_images("tar:memory://nowhere/*.tar")
    with pytest.raises(UsageError, match="nonsense"):
        open_images("tar:nonsense://a.tar")


def idx(folder: Path, prefix: str, count: int, packed: bool) -> None:
    images = PIXELS[:count, :, :, 0]
    data = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4) for size in images.shape) + images.tobytes()
    labels = bytes([0, 0, 8, 1]) + count.to_bytes(4) + bytes(LABELS[:count])
    for name, content in ((f"{prefix}-images-idx3-ubyte", data), (f"{prefix}-labels-idx1-ubyte", labels)):
        path = folder / (name + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_with_their_labels_and_parts(tmp_path, packed):
    idx(tmp_path, "train", COUNT, packed)
    idx(tmp_path, "t10k", 5, packed)
    source = f"idx:{tmp_path}"
    images = open_images(source, "train", channels=1)
    assert (len(images), images.labels, images.channels) == (COUNT, LABELS, 1)
    assert np.array_equal(images.read(4)[..., 0], PIXELS[4, ..., 0])
    assert open_images(source, "train").read(4).shape == (8, 9, 3)
    assert len(open_images(source, "test")) == 5
    assert len(open_images(source)) == COUNT + 5
    training, measuring = open_data(DataConfig(source=source, size=8, validation="test"))
    assert (len(training), len(measuring)) == (COUNT, 5)
    with pytest.raises(NoSplit):
        open_images(source, "validation")


@pytest.mark.parametrize("packed", [False, True])
@counts
def test_a_mutated_idx_file_is_read_rightly_or_refused_in_one_line(tmp_path, packed, count):
    idx(tmp_path, "train", COUNT, packed)
    path = next(tmp_path.glob("train-images*"))
    survives(read_idx, path, seed=3, count=count)
    survives(lambda path: open_images(f"idx:{path}", channels=1), path, seed=4, count=count // 3)


def test_arrays_of_many_channels_and_sixteen_bits_are_read_as_they_are(tmp_path):
    bands = np.random.default_rng(1).integers(0, 65536, (3, 8, 8, 5), dtype=np.uint16)
    np.savez(tmp_path / "bands.npz", images=bands)
    images = open_images(f"npz:{tmp_path / 'bands.npz'}", channels=5, depth=16)
    assert np.array_equal(images.read(2), bands[2])
    with pytest.raises(UsageError, match=r"set data.channels = 5"):
        open_images(f"npz:{tmp_path / 'bands.npz'}")
    batch = next(training_batches(images, TRANSFORMS["published"](4), 2, seed=0))
    assert batch.images.shape == (2, 5, 4, 4)


def test_arrays_that_do_not_fit_together_are_refused(tmp_path):
    for content, words in [
        ({"pictures": PIXELS}, "no array of images"),
        ({"images": PIXELS.astype(np.float32)}, "float32"),
        ({"images": PIXELS, "labels": np.arange(3)}, "12"),
        ({"images": PIXELS, "labels": -np.arange(COUNT)}, "labels from"),
        ({"images": PIXELS, "captions": np.array(["a"])}, "1 captions for 12 images"),
        ({"images": PIXELS[0, 0]}, r"N, H, W"),
    ]:
        np.savez(tmp_path / "a.npz", **content)
        with pytest.raises(UsageError, match=words):
            open_images(f"npz:{tmp_path / 'a.npz'}")


# Lists


def test_a_list_has_splits_names_of_classes_and_plain_lines(tmp_path):
    as_list(tmp_path)
    (tmp_path / "b.tsv").write_text("file\tclass\tsplit\n00.png\tdog\ttrain\n01.png\tcat\tval\n02.png\tcat\ttrain\n")
    images = open_images(f"list:{tmp_path / 'b.tsv'}", "train")
    assert (images.names, images.labels, images.classes) == (["00.png", "02.png"], [1, 0], ["cat", "dog"])
    assert open_images(f"list:{tmp_path / 'b.tsv'}", "validation").names == ["01.png"]
    (tmp_path / "c.txt").write_text("03.png\n\n04.png\n")
    assert open_images(f"list:{tmp_path / 'c.txt'}").names == ["03.png", "04.png"]
    (tmp_path / "d.csv").write_text("03.png,1\n04.png,0\n")
    assert open_images(f"list:{tmp_path / 'd.csv'}").labels == [1, 0]
    for text, words in [("path\na.png\na.png", "twice"), ("name\nx", "no column 'path'"), ("path\n", "no images")]:
        (tmp_path / "e.csv").write_text(text)
        with pytest.raises(UsageError, match=words):
            open_images(f"list:{tmp_path / 'e.csv'}")


@counts
def test_a_mutated_list_is_read_or_refused_in_one_line(tmp_path, count):
    as_list(tmp_path)

    def read(path: Path) -> None:
        images = open_images(f"list:{path}")
        for number in range(len(images)):
            try:
                images.read(number)
            except UnreadableImage:
                continue

    survives(read, tmp_path / "list.csv", seed=5, count=count)


# Parquet


@counts
def test_a_mutated_parquet_file_is_read_or_refused_in_one_line(tmp_path, count):
    as_parquet(tmp_path)

    def read(path: Path) -> None:
        images = open_images(f"parquet:{path}")
        for number in range(min(len(images), 20)):
            try:
                images.read(number)
            except UnreadableImage:
                continue

    survives(read, tmp_path / "0.parquet", seed=6, count=count)


def test_columns_of_parquet_files_can_be_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"photo": [png(0), png(1)], "kind": ["b", "a"]}), tmp_path / "a.parquet")
    images = open_images(f"parquet:{tmp_path}/a.parquet?image=photo&label=kind")
    assert (images.classes, images.labels) == (["a", "b"], [1, 0])
    assert np.array_equal(images.read(1), PIXELS[1])
    with pytest.raises(UsageError, match=r"no column of images .* photo, kind"):
        open_images(f"parquet:{tmp_path}/a.parquet")
    with pytest.raises(UsageError, match="no column 'x'"):
        open_images(f"parquet:{tmp_path}/a.parquet?image=x")


# Mixtures


def test_a_mixture_shows_each_source_by_its_weight(tmp_path):
    for folder, count in (("a", 8), ("b", 2)):
        (tmp_path / folder / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / folder / folder / f"{number}.png").write_bytes(png(number if folder == "a" else 10 + number))
    source = f"mixture:0.5*folder:{tmp_path / 'a'} + 0.5*{tmp_path / 'b'}"
    images = open_images(source)
    assert len(images) == len(set(images.names)) == 16  # the 8 of a once, the 2 of b four times each
    assert (images.classes, images.labels) == (["a", "b"], [0] * 8 + [1] * 8)
    assert [np.array_equal(images.read(8 + slot), PIXELS[10 + slot % 2]) for slot in range(8)] == [True] * 8
    assert pickle.loads(pickle.dumps(images)).fingerprint() == images.fingerprint()
    rest, held = images.hold_out(0.2)
    pictures = lambda part: {part.read(number).tobytes() for number in range(len(part))}  # noqa: E731
    assert not pictures(rest) & pictures(held)  # however often it is shown, a picture is on one side
    assert len(pictures(rest) | pictures(held)) == 10
    for wrong, words in [("a", "two sources"), ("-1*a + b", "no part"), ("0*a + b", "no part"), ("1* + b", "no part")]:
        with pytest.raises(UsageError, match=words):
            open_images(f"mixture:{wrong}")


# The datasets library


def test_a_table_of_the_datasets_library_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"]), "text": datasets.Value("string")}
    )
    rows = {"img": [{"bytes": png(n), "path": None} for n in range(COUNT)], "label": LABELS, "text": CAPTIONS}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
    images = open_images(f"datasets:{tmp_path / 'd'}")
    assert (images.labels, images.classes, list(images.captions)) == (LABELS, ["x", "y", "z"], CAPTIONS)
    assert np.array_equal(images.read(7), PIXELS[7])
    assert np.array_equal(pickle.loads(pickle.dumps(images)).read(2), PIXELS[2])
    with pytest.raises(NoSplit):
        open_images(f"datasets:{tmp_path / 'd'}", "validation")


@pytest.mark.filterwarnings("ignore:.*is read as a stream", "ignore:.*fork")
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_stream_over_http_is_the_same_images_with_any_workers(tmp_path, server, kind):
    ending_of = {"parquet": "parquet", "webdataset": "tar"}
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"]), "text": datasets.Value("string")}
    )
    for shard in range(3):  # more files than workers: the library would give each worker its own
        own = range(4 * shard, 4 * shard + 4)
        rows = {
            "img": [{"bytes": png(number), "path": None} for number in own],
            "label": [LABELS[number] for number in own],
            "text": [CAPTIONS[number] for number in own],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{shard:02d}.parquet")
        with tarfile.open(tmp_path / f"{shard:02d}.tar", "w") as archive:
            for number in own:
                for ending, data in (("png", png(number)), ("cls", b"%d" % LABELS[number])):
                    add(archive, f"{number:03d}.{ending}", data)
                add(archive, f"{number:03d}.txt", CAPTIONS[number].encode())
    location = f"datasets:{kind}?files={server}/{{00..02}}.{ending_of[kind]}&streaming=true&window=5"
    images = open_images(location, "train")
    classes = ["x", "y", "z"] if kind == "parquet" else ["0", "1", "2"]
    assert (images.labels, images.classes, list(images.captions)) == (LABELS, classes, CAPTIONS)
    for number in (7, 8, 2):
        assert np.array_equal(images.read(number), PIXELS[number])
    for workers in (0, 2):
        batches = ordered_batches(images, None, 1, workers=workers)
        assert [number for batch in batches for number in batch.numbers.tolist()] == list(range(COUNT))
    steps = [
        [batch.numbers.tolist() for batch in itertools.islice(made, 6)]
        for made in (training_batches(images, TRANSFORMS["crop"](8), 4, 0, workers=workers) for workers in (0, 2))
    ]
    assert steps[0] == steps[1]
    again = next(training_batches(images, TRANSFORMS["crop"](8), 4, 0, first_step=5))
    assert again.numbers.tolist() == steps[0][5]
    with pytest.raises(UsageError, match="datasets cannot load"):
        open_images(f"datasets:{kind}?files={server}/none.{ending_of[kind]}&streaming=true", "train")
    with pytest.raises(UsageError, match="there is no file"):
        open_images(f"datasets:{kind}?files={tmp_path}/none.{ending_of[kind]}&streaming=true", "train")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        open_images("datasets:someone/something")
